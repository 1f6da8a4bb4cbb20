"""Passes on a card: with every memory technique and every two of them, and through several architectures."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from card import CARD
from conftest import BOS, END, byte_tokenizer
from made_models import KINDS, Pass, assert_equal, batch, held_out, one_pass, trained

from qtune.evaluate.generate import answer
from qtune.evaluate.held_out_loss import to_device
from qtune.memory.engine import Engine
from qtune.memory.memory_tracker import LiveBytes, block_bytes
from qtune.memory.techniques import Techniques
from qtune.merge.live_weights import held
from qtune.model import adapter, base
from qtune.model.activation_directions import point_along_inputs
from qtune.model.checkpoint import BaseCheckpoint
from qtune.model.loaded import Loaded
from qtune.model.quantization_error import make_good
from qtune.model.tokenizer import load_tokenizer
from qtune.recipe.schema import Lora, Model

DOCUMENTS = (9, 5)
PROMPTS = [[BOS, *range(40, 48)], [BOS, 50]]  # the longer one is longer than a window
ALONE: dict[str, dict[str, Any]] = {
    "recomputed": {"recomputed_layers": 1},
    "host checkpoints": {"recomputed_layers": 2, "recomputed_attention": 1, "host_checkpoints": True},
    "tiles": {"tile_tokens": 8},
    "head groups": {"head_groups": 2},
    "host embedding": {"host_embedding": True},
    "host head": {"head": "host"},
    "head in NF4": {"head": "nf4"},
    "one streamed": {"recomputed_layers": 2, "streamed_layers": 1},
    "all streamed": {"recomputed_layers": 2, "streamed_layers": 2},
}
CONTAINED = ({"recomputed", "host checkpoints"}, {"recomputed", "all streamed"}, {"host head", "head in NF4"})
PAIRS = [
    pair
    for pair in itertools.combinations(ALONE, 2)
    if set(pair) not in CONTAINED and "one streamed" not in pair  # as all streamed, and one that is not
]
THREES = [  # in which any two are found together
    ("head groups", "host embedding", "host head"),
    ("host embedding", "head in NF4", "all streamed"),
    ("recomputed", "tiles", "host embedding"),
    ("host checkpoints", "host head", "all streamed"),
    ("recomputed", "head groups", "head in NF4"),
    ("tiles", "head groups", "all streamed"),
    ("host checkpoints", "tiles", "head in NF4"),
    ("host checkpoints", "head groups", "host embedding"),
    ("recomputed", "tiles", "host head"),
]


def techniques(*names: str) -> Techniques:
    return Techniques(**{name: value for each in names for name, value in ALONE[each].items()})


def outcome(folder: Path, device: str, on: Techniques, lora: Lora) -> tuple[Pass, float, list[str]]:
    """From the files to the gradients, the held-out loss and answers."""
    model = adapter.attach(base.load_base(Model(base=str(folder)), device, "float32", on), lora, 0)
    generator = torch.Generator().manual_seed(1)
    for parameter in trained(model):
        parameter.data = torch.randn(parameter.shape, generator=generator).mul_(0.1).to(device)
    Engine(model).switch_to(on)
    given = {name: to_device(value, device) for name, value in batch(DOCUMENTS).items()}
    torch.manual_seed(0)
    found = one_pass(model, given)
    gradients = {name: gradient.cpu() for name, gradient in found.gradients.items()}
    loaded = Loaded(model, load_tokenizer(Model(base=str(folder))), device, "float32")
    return Pass(found.nats, gradients), held_out(model, given), answer(loaded, PROMPTS, [END], 3)


def assert_as_on_the_processor(folder: Path, on: Techniques, lora: Lora) -> None:
    ours, *others = outcome(folder, CARD, on, lora)
    theirs, *other_others = outcome(folder, "cpu", on, lora)
    assert_equal(ours, theirs)
    assert others == other_others


def test_any_two_are_together_in_the_threes() -> None:
    together = {frozenset(pair) for three in THREES for pair in itertools.combinations(three, 2)}
    assert together == set(map(frozenset, PAIRS))


@pytest.mark.parametrize("names", [("one streamed",), *THREES], ids=" and ".join)
def test_three_techniques_give_what_they_give_on_the_processor(tiny_base: Path, names: tuple[str, ...]) -> None:
    assert_as_on_the_processor(tiny_base, techniques(*names), Lora(rank=4))


@pytest.mark.long
@pytest.mark.parametrize("names", [*((name,) for name in ALONE), *PAIRS], ids=" and ".join)
def test_so_do_each_and_any_two_by_themselves(tiny_base: Path, names: tuple[str, ...]) -> None:
    assert_as_on_the_processor(tiny_base, techniques(*names), Lora(rank=4))


def test_what_attention_returned_is_kept_on_the_card(tiny_base: Path) -> None:
    """In the second of two layers; the other runs it again."""
    on = techniques("host checkpoints")
    model = adapter.attach(base.load_base(Model(base=str(tiny_base)), CARD, "float32", on), Lora(rank=4), 0)
    Engine(model).switch_to(on)
    given = {name: to_device(value, CARD) for name, value in batch((14,)).items()}
    with LiveBytes() as counter:
        one_pass(model, given)
    config, tokens = model.config, 14
    kept = 4 * tokens * config.hidden_size, 4 * tokens * config.num_attention_heads
    assert max(peak.device.get("kept attention", 0) for peak in counter.peaks.values()) == sum(map(block_bytes, kept))


def test_so_does_dora(tiny_base: Path) -> None:
    """peft copies each layer to find the lengths that it begins with."""
    assert_as_on_the_processor(tiny_base, techniques("all streamed", "host embedding"), Lora(rank=4, dora=True))


@pytest.mark.parametrize("kind", ["mistral", "gemma3", "qwen3", "qwen3 moe"])
def test_so_does_an_architecture_most_of_which_is_on_the_host(tmp_path: Path, kind: str) -> None:
    """Windows, scaled and tied tables, experts; dropout draws again what it drew, from a card's own numbers."""
    torch.manual_seed(0)
    KINDS[kind]().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    lora = Lora(rank=4, targets=["q_proj", "experts"]) if "moe" in kind else Lora(rank=4, dropout=0.1)
    assert_as_on_the_processor(tmp_path, techniques("all streamed", "host embedding", "host head", "tiles"), lora)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3"])
def test_so_do_trained_rows_of_a_table_that_is_elsewhere(tmp_path: Path, kind: str) -> None:
    """Two tables, one, and one whose rows are scaled; the rows stand on the card, whatever they were taken from."""
    torch.manual_seed(0)
    KINDS[kind]().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    lora = Lora(rank=4, targets=("q_proj",), train_tokens=("a", "b", "c"))
    on = techniques("all streamed", "host embedding", "tiles")
    assert_as_on_the_processor(tmp_path, on, lora)


def begun(folder: Path, device: str, on: Techniques) -> list[torch.Tensor]:
    """A and B of LoftQ, and then A of EVA, of layers that are streamed."""
    model = adapter.attach(base.load_base(Model(base=str(folder)), device, "float32", on), Lora(rank=4), 0)
    checkpoint = BaseCheckpoint.open(folder)

    def weights(name: str, layer: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        return checkpoint.called(f"{name}.weight").to(device, torch.float32), held(layer, torch.device(device))

    make_good(model, weights)
    found = [parameter.detach().cpu().clone() for parameter in trained(model)]
    Engine(model).switch_to(on)
    given = {name: to_device(value, device) for name, value in batch((40, 30)).items()}
    loaded = Loaded(model.eval(), load_tokenizer(Model(base=str(folder))), device, "float32")
    with torch.no_grad(), loaded.as_base():
        point_along_inputs(model, [given], lambda pack: model(**pack, fused_loss=True))
    return found + [parameter.detach().cpu() for parameter in trained(model)]


def test_an_adapter_begins_as_on_the_processor(tiny_base: Path) -> None:
    on = techniques("all streamed", "host embedding", "host head", "tiles", "head groups")
    for ours, theirs in zip(*(begun(tiny_base, device, on) for device in (CARD, "cpu")), strict=True):
        assert torch.equal(ours, theirs)
