"""L2: micro-batch times accumulation may be factored as one likes: the step's loss and gradient stay the same."""

import random
from collections.abc import Iterator
from pathlib import Path

import torch

from fault_lab import real_models

WHAT = "24 sequences as 1 x 24, 2 x 12 ... 24 x 1; loss within two float32 roundings, gradient within 1e-6"
SEQUENCES = 24
# Weights are float64 here; norms, logits and the sum of the loss are float32 by design.
MOST_LOSS, MOST_GRADIENT = 2 * 2.0**-23, 1e-6


def run(cases: int, seed: int, folder: Path) -> Iterator[str | None]:
    names = real_models.names()
    sizes = [size for size in range(1, SEQUENCES + 1) if SEQUENCES % size == 0]
    models = {name: real_models.loaded(name, torch.float64) for name in names}
    for case in range(cases):
        name = names[case % len(names)]
        packed = real_models.rows(models[name], SEQUENCES, random.Random(f"{seed} {case}"))
        yield _one(models[name], packed, sizes, Path(name).name)


def _one(model: torch.nn.Module, packed: list, sizes: list[int], name: str) -> str | None:
    found = []
    for size in sizes:
        loss = 0.0
        for start in range(0, SEQUENCES, size):
            nats = real_models.summed_loss(model, packed[start : start + size])
            nats.backward()
            loss += float(nats.detach())
        found.append((loss, real_models.gradients(model)))
    loss, gradient = found[0]
    for size, (other_loss, other) in zip(sizes[1:], found[1:], strict=True):
        off, turned = abs(other_loss / loss - 1), float((other - gradient).norm() / gradient.norm())
        if off > MOST_LOSS or turned > MOST_GRADIENT:
            return f"{name}, micro-batch {size}: loss {off:.1e} and gradient {turned:.1e} from micro-batch 1"
    return None
