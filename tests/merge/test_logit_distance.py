"""Divergences by hand, and when rows enough have been measured to be sure of them."""

import pytest
import torch

from qtune.merge.logit_distance import (
    MAX_ROW_TOKENS,
    MAX_ROWS,
    Closeness,
    RowCloseness,
    divergences,
    is_kl_at_most,
    is_loss_rise_at_most,
    usable_rows,
)


def row(kl: float, base_kl: float = 0.0, rise: float = 0.0, positions: int = 100) -> RowCloseness:
    """A row of so many nats a position, and a token."""
    return RowCloseness(positions, kl * positions, kl, base_kl * positions, positions, 0.0, rise * (positions - 1))


def test_a_divergence_is_that_of_two_known_distributions() -> None:
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.5, 0.25])
    expected = 0.5 * torch.tensor(2.0).log() + 0.25 * torch.tensor(0.5).log()
    (found,) = divergences(p.log()[None], q.log()[None])
    assert found.item() == pytest.approx(expected.item(), abs=1e-7)
    assert divergences(q.log()[None], q.log()[None]).item() == 0


def test_a_divergence_too_small_for_float32_sums_is_not_lost() -> None:
    logits = torch.randn(70, 50, generator=torch.Generator().manual_seed(0))  # more than are measured at once
    moved = logits.clone()
    moved[:, 0] += 1e-3
    found = divergences(logits, moved)
    assert found.shape == (70,)
    assert (found > 0).all()
    assert found.max() < 1e-6


def test_over_rows_every_position_counts_alike() -> None:
    found = Closeness.over([row(0.1, positions=10), row(0.4, base_kl=0.2, positions=30)])
    assert found.mean_kl == pytest.approx(0.325)
    assert found.base_kl == pytest.approx(0.15)
    assert (found.rows, found.positions, found.max_kl) == (2, 40, 0.4)


@pytest.mark.parametrize(
    ("rows", "answer"),
    [
        ([row(1e-4)] * 4, True),  # under the least
        ([row(5e-3, base_kl=1.0)] * 4, True),  # over it, and under a hundredth of what tuning changed
        ([row(5e-2, base_kl=1.0)] * 4, False),  # over both
        ([row(5e-2, base_kl=1.0)] * 3, None),  # too few to say
        ([row(0.0), row(2e-3), row(0.0), row(2e-3)], None),  # about the least
    ],
)
def test_the_bound_of_kl(rows: list[RowCloseness], answer: bool | None) -> None:
    assert is_kl_at_most(1e-3, 0.01, rows) is answer


@pytest.mark.parametrize(("rise", "answer"), [(0.05, True), (-1.0, True), (0.2, False)])
def test_the_bound_of_a_loss_that_rises(rise: float, answer: bool) -> None:
    assert is_loss_rise_at_most(0.1, [row(0.0, rise=rise)] * 4) is answer


def test_rows_of_one_token_predict_nothing_and_long_ones_are_cut() -> None:
    found = usable_rows([[1], [], list(range(2 * MAX_ROW_TOKENS)), *[[1, 2]] * (2 * MAX_ROWS)], "it")
    assert len(found) == MAX_ROWS
    assert len(found[0]) == MAX_ROW_TOKENS
