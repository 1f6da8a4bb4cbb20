"""The order of rows: a function of seed and epoch, whatever else draws random numbers."""

import itertools
import random

import numpy
import pytest
import torch

from qtune.train.sampler import DataOrder, dealt


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


def test_equal_shares_are_every_nth_row() -> None:
    assert dealt([7, 3, 5, 1, 2], int, [0.5, 0.5]) == [[7, 5, 2], [3, 1]]


def test_a_rank_with_a_larger_share_gets_more_tokens_in_the_order_of_the_step() -> None:
    tokens = dict(enumerate([90, 100, 80, 100, 30, 100, 100]))
    fast, slow = dealt([4, 1, 0, 5, 2, 6, 3], tokens.__getitem__, [0.75, 0.25])
    assert sorted([*fast, *slow]) == list(range(7))
    assert fast == [row for row in [4, 1, 0, 5, 2, 6, 3] if row in fast]
    assert sum(map(tokens.get, fast)) == 470
    assert sum(map(tokens.get, slow)) == 130  # a quarter of 600 would be 150, which no rows are


@pytest.mark.parametrize("shares", [(0.5, 0.3, 0.2), (0.9, 0.1), (0.4, 0.35, 0.25)])
def test_ranks_end_together_but_for_a_row(shares: tuple[float, ...]) -> None:
    tokens = [100 + 7 * (row % 13) for row in range(40)]
    ends = [
        sum(tokens[row] for row in rows) / share
        for rows, share in zip(dealt(range(40), tokens.__getitem__, shares), shares, strict=True)
    ]
    assert max(ends) - min(ends) <= max(tokens) / min(shares)


@pytest.mark.parametrize("speeds", [(1.0, 0.6), (1.0, 0.4, 2.5), (1.0, 3.0, 3.0)])
def test_of_rows_that_are_all_as_long_no_other_dealing_ends_sooner(speeds: tuple[float, ...]) -> None:
    rows = 7
    of_all = itertools.product(range(rows + 1), repeat=len(speeds))
    ends = [max(n / speed for n, speed in zip(counts, speeds, strict=True)) for counts in of_all if sum(counts) == rows]
    shares = [speed / sum(speeds) for speed in speeds]
    counts = [len(ours) for ours in dealt(range(rows), lambda row: 1, shares)]
    assert max(n / speed for n, speed in zip(counts, speeds, strict=True)) == pytest.approx(min(ends))
