"""Trained models small enough for a processor, ready for LoRA, and rows of random documents for them."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftModel

from qtune.data.packing import PackedRow, collate
from qtune.memory.engine import Engine
from qtune.memory.techniques import Techniques
from qtune.model import adapter, base
from qtune.recipe.schema import Lora, Model

ROOT = Path(__file__).resolve().parents[2]
MATERIAL = Path(os.environ.get("QTUNE_MATERIAL", ROOT.parent / "shared" / "material"))
BESIDE = ("stories260K-llama", "TinyStories-656K-llama")


def names() -> list[str]:
    """The base inside qtune, and those beside the checkout where they are."""
    beside = [str(MATERIAL / "models" / name) for name in BESIDE]
    return ["demo", *(path for path in beside if Path(path).is_dir())]


def loaded(name: str, dtype: torch.dtype, techniques: Techniques | None = None) -> PeftModel:
    """The model in `dtype`, unquantised, with an adapter that is not zero and the memory techniques on."""
    model = base.load_base(Model(base=name, quantization="none"), "cpu", "float32")
    model = adapter.attach(model, Lora(rank=4), seed=0).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.trained_parameters(model):
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(dtype))
    if techniques is not None:
        Engine(model).switch_to(techniques)
    return model.train()


def rows(model: PeftModel, count: int, rng: random.Random) -> list[PackedRow]:
    """Packs of one to four documents of 2 to 40 tokens, a random part of each trained."""
    vocabulary = model.get_base_model().config.vocab_size
    return [_row([_document(rng, vocabulary) for _ in range(rng.randint(1, 4))]) for _ in range(count)]


def _document(rng: random.Random, vocabulary: int) -> tuple[list[int], list[int]]:
    ids = [rng.randrange(vocabulary) for _ in range(rng.randint(2, 40))]
    prompt = rng.randrange(len(ids) - 1)
    return ids, [-100] * prompt + ids[prompt:]


def _row(documents: list[tuple[list[int], list[int]]]) -> PackedRow:
    return {
        "input_ids": [token for ids, _ in documents for token in ids],
        "labels": [label for _, labels in documents for label in labels],
        "seq_lengths": [len(ids) for ids, _ in documents],
    }


def each_document(row: PackedRow) -> Iterator[tuple[list[int], list[int]]]:
    start = 0
    for length in row["seq_lengths"]:
        yield row["input_ids"][start : start + length], row["labels"][start : start + length]
        start += length


def summed_loss(model: PeftModel, packed: list[PackedRow]) -> torch.Tensor:
    """The summed loss of one micro-batch, as training makes it."""
    nats: torch.Tensor = model(**collate(packed), fused_loss=True).nats
    return nats


def gradients(model: PeftModel) -> torch.Tensor:
    """All of the adapter's gradients in one row, and none afterwards."""
    found = torch.cat([p.grad.flatten() for p in adapter.trained_parameters(model) if p.grad is not None])
    model.zero_grad()
    return found
