"""Scores a person can check."""

import pytest

from qtune.evaluate.metrics import exact_match, interval, token_f1


@pytest.mark.parametrize(
    ("answer", "reference", "exact", "f1"),
    [
        ("Beta blocker.", "beta blocker", 1.0, 1.0),
        ("the statin", "Statin", 1.0, 1.0),
        ("alpha blocker", "beta blocker", 0.0, 0.5),
        ("", "statin", 0.0, 0.0),
        ("", "", 1.0, 1.0),
        ("a b c d", "c d e f", 0.0, 4 / 7),  # "a" is an article: 2 shared of 3 and 4
        ("yes yes yes", "yes", 0.0, 0.5),
    ],
)
def test_both_metrics(answer: str, reference: str, exact: float, f1: float) -> None:
    assert exact_match(answer, reference) == exact
    assert token_f1(answer, reference) == pytest.approx(f1)


def test_the_interval_holds_the_mean_and_narrows_with_more_rows() -> None:
    low, high = interval([1.0, 0.0] * 20)
    assert low < 0.5 < high
    assert interval([1.0] * 10) == (1.0, 1.0)
    narrow = interval([1.0, 0.0] * 500)
    assert narrow[1] - narrow[0] < (high - low) / 3
    assert interval([1.0, 0.0] * 20) == (low, high)
