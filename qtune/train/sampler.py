"""In which order rows are trained on: a function of the seed and the epoch, and of nothing else."""

import math
from collections.abc import Iterator

import torch


class DataOrder(torch.utils.data.Sampler[int]):
    """Row numbers in the order of each epoch: a permutation drawn from a generator of its own, seeded seed + epoch."""

    def __init__(self, rows: int, seed: int):
        self.rows, self.seed, self.epoch = rows, seed, 0

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        return iter(self.of_epoch(self.epoch))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def of_epoch(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed + epoch)
        order: list[int] = torch.randperm(self.rows, generator=generator).tolist()
        return order

    def of_step(self, step: int, micro_batch: int, accumulation: int) -> list[int]:
        """The rows of optimizer step `step`, counted from 1. The last step of an epoch takes what is left of it."""
        rows_a_step = micro_batch * accumulation
        epoch, number = divmod(step - 1, math.ceil(self.rows / rows_a_step))
        return self.of_epoch(epoch)[number * rows_a_step : (number + 1) * rows_a_step]
