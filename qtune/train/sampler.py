"""In which order rows are trained on: a function of the seed and the epoch, and of nothing else."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch

CHUNK_ROWS = 1 << 16  # as Python's numbers at once


class DataOrder(torch.utils.data.Sampler[int]):
    """Row numbers in the order of each epoch: a permutation drawn from a generator of its own, seeded seed + epoch."""

    def __init__(self, rows: int, seed: int):
        self.rows, self.seed, self.epoch = rows, seed, 0
        self._drawn: tuple[int, torch.Tensor] | None = None

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        for some in self._permutation(self.epoch).split(CHUNK_ROWS):
            yield from some.tolist()

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def of_epoch(self, epoch: int) -> list[int]:
        order: list[int] = self._permutation(epoch).tolist()
        return order

    def of_step(self, step: int, micro_batch: int, accumulation: int) -> list[int]:
        """The rows of optimizer step `step`, counted from 1. The last step of an epoch takes what is left of it."""
        rows_a_step = micro_batch * accumulation
        epoch, number = divmod(step - 1, math.ceil(self.rows / rows_a_step))
        rows: list[int] = self._permutation(epoch)[number * rows_a_step : (number + 1) * rows_a_step].tolist()
        return rows

    def _permutation(self, epoch: int) -> torch.Tensor:
        """The last one is kept: of ten million rows it takes a second to draw, and of every step it is asked."""
        if self._drawn is None or self._drawn[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self._drawn = epoch, torch.randperm(self.rows, generator=generator)
        return self._drawn[1]


def dealt(rows: Sequence[int], tokens_of: Callable[[int], int], shares: Sequence[float]) -> list[list[int]]:
    """The rows of a step for each of N ranks, which take these shares of its tokens: every N-th where all are equal.

    Otherwise the longest row goes first, each to the rank that would be done with it soonest (longest processing time
    first on machines of unlike speed: Gonzalez, Ibarra and Sahni 1977). A rank has its rows in the order of the step.
    """
    ranks = range(len(shares))
    if len(set(shares)) == 1:
        return [list(rows[rank :: len(shares)]) for rank in ranks]
    tokens = [tokens_of(row) for row in rows]
    taken, owners = [0] * len(shares), [0] * len(rows)
    for place in sorted(range(len(rows)), key=lambda place: -tokens[place]):
        owners[place] = min(ranks, key=lambda rank: (taken[rank] + tokens[place]) / shares[rank])
        taken[owners[place]] += tokens[place]
    return [[row for row, owner in zip(rows, owners, strict=True) if owner == rank] for rank in ranks]
