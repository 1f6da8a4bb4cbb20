"""L1: the loss that is trained on is the mean cross-entropy of the documents, each alone, in float64."""

import random
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from fault_lab import real_models

WHAT = "packed batches through the loss in tiles, against a float64 cross-entropy of each document; within 1e-6"
MOST = 1e-6


def run(cases: int, seed: int, folder: Path) -> Iterator[str | None]:
    names = real_models.names()
    models = {name: real_models.loaded(name, torch.float32) for name in names}
    for case in range(cases):
        name, rng = names[case % len(names)], random.Random(f"{seed} {case}")
        packed = real_models.rows(models[name], rng.randint(1, 4), rng)
        labels = sum(label != -100 for row in packed for _, ls in real_models.each_document(row) for label in ls[1:])
        with torch.no_grad():
            ours = float(real_models.summed_loss(models[name], packed)) / labels
            wanted = (
                sum(_alone(models[name], *one) for row in packed for one in real_models.each_document(row)) / labels
            )
        off = abs(ours - wanted) / wanted
        yield None if off <= MOST else f"{Path(name).name}: {ours} is {off:.1e} from {wanted}"


def _alone(model: torch.nn.Module, ids: list[int], labels: list[int]) -> float:
    logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].double()
    return float(cross_entropy(logits, torch.tensor(labels[1:]), ignore_index=-100, reduction="sum"))
