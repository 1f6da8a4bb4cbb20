"""L3: what stands beside a document in its pack changes nothing of it."""

import random
from collections.abc import Iterator
from pathlib import Path

import torch

from fault_lab import real_models
from qtune.data.packing import PackedRow, collate

WHAT = "other documents beside one in its pack: its logits equal to the bit; packed gradient within 1e-6 of each alone"
MOST = 1e-6


def run(cases: int, seed: int, folder: Path) -> Iterator[str | None]:
    names = real_models.names()
    models = {name: real_models.loaded(name, torch.float64) for name in names}
    for case in range(cases):
        name, rng = names[case % len(names)], random.Random(f"{seed} {case}")
        row = real_models.rows(models[name], 1, rng)[0]
        told = _leak(models[name], row, rng) or _gradient(models[name], row)
        yield None if told is None else f"{Path(name).name}: {told}"


def _leak(model: torch.nn.Module, row: PackedRow, rng: random.Random) -> str | None:
    """Every document but one is overwritten; that one's logits must not notice."""
    kept = rng.randrange(len(row["seq_lengths"]))
    start = sum(row["seq_lengths"][:kept])
    here = slice(start, start + row["seq_lengths"][kept])
    other = [rng.randrange(model.get_base_model().config.vocab_size) for _ in row["input_ids"]]
    other[here] = row["input_ids"][here]
    with torch.no_grad():
        before, after = (_logits(model, {**row, "input_ids": ids})[here] for ids in (row["input_ids"], other))
    return None if torch.equal(before, after) else f"logits moved by {float((before - after).abs().max()):.1e}"


def _logits(model: torch.nn.Module, row: PackedRow) -> torch.Tensor:
    batch = collate([row])
    logits: torch.Tensor = model(**{name: value for name, value in batch.items() if name != "labels"}).logits[0]
    return logits


def _gradient(model: torch.nn.Module, row: PackedRow) -> str | None:
    real_models.summed_loss(model, [row]).backward()
    packed = real_models.gradients(model)
    for ids, labels in real_models.each_document(row):
        alone: PackedRow = {"input_ids": ids, "labels": labels, "seq_lengths": [len(ids)]}
        real_models.summed_loss(model, [alone]).backward()
    one_by_one = real_models.gradients(model)
    off = float((packed - one_by_one).norm() / one_by_one.norm())
    return None if off <= MOST else f"the packed gradient is {off:.1e} from that of its documents alone"
