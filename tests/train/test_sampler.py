"""The order of rows: a function of seed and epoch, whatever else draws random numbers."""

import random

import numpy
import pytest
import torch

from qtune.train.sampler import DataOrder


def test_every_epoch_is_a_permutation_of_its_own() -> None:
    order = DataOrder(50, seed=3)
    epochs = [order.of_epoch(epoch) for epoch in range(4)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert len(order) == 50


def test_it_follows_seed_and_epoch_and_nothing_else() -> None:
    first = DataOrder(50, seed=3).of_epoch(1)
    for seed in (torch.manual_seed, random.seed, numpy.random.seed):
        seed(123)
    before = torch.get_rng_state()
    assert DataOrder(50, seed=3).of_epoch(1) == first
    assert torch.equal(torch.get_rng_state(), before)
    assert DataOrder(50, seed=4).of_epoch(1) != first


def test_the_sampler_walks_the_epoch_that_was_set() -> None:
    order = DataOrder(20, seed=0)
    assert list(order) == order.of_epoch(0)
    order.set_epoch(5)
    assert list(order) == order.of_epoch(5)


@pytest.mark.parametrize(
    ("rows", "micro_batch", "accumulation"), [(13, 1, 2), (13, 2, 3), (12, 2, 3), (5, 4, 4), (1, 1, 8)]
)
def test_the_rows_of_its_steps_are_those_of_the_epoch(rows: int, micro_batch: int, accumulation: int) -> None:
    order = DataOrder(rows, seed=1)
    per_epoch = -(-rows // (micro_batch * accumulation))
    for epoch in range(3):
        steps = range(epoch * per_epoch + 1, (epoch + 1) * per_epoch + 1)
        found = [order.of_step(step, micro_batch, accumulation) for step in steps]
        assert [row for rows_of_step in found for row in rows_of_step] == order.of_epoch(epoch)
        assert all(len(rows_of_step) == micro_batch * accumulation for rows_of_step in found[:-1])
