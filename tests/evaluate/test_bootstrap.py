"""Intervals a person can check."""

import pytest

from qtune.evaluate import before_after as interval_module
from qtune.evaluate.before_after import interval, paired_interval


def test_the_interval_holds_the_mean_and_narrows_with_more_rows() -> None:
    low, high = interval([1.0, 0.0] * 20)
    assert low < 0.5 < high
    assert interval([1.0] * 10) == (1.0, 1.0)
    narrow = interval([1.0, 0.0] * 500)
    assert narrow[1] - narrow[0] < (high - low) / 3
    assert interval([1.0, 0.0] * 20) == (low, high)


def test_the_interval_does_not_depend_on_how_many_rows_are_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many rows are resampled in several goes; both ends stay within what resampling itself moves them."""
    scores = [1.0, 0.0, 0.5] * 100
    whole = interval(scores)
    monkeypatch.setattr(interval_module, "RESAMPLES_AT_ONCE", 1000)
    assert interval(scores) == pytest.approx(whole, abs=0.003)


def test_the_interval_is_that_of_the_binomial() -> None:
    """For 40 of 100 right, the mean's standard error is 0.049; a percentile bootstrap finds 0.40 ± 1.96 of them."""
    low, high = interval([1.0] * 40 + [0.0] * 60)
    assert low == pytest.approx(0.304, abs=0.011)
    assert high == pytest.approx(0.496, abs=0.011)


def test_pairing_narrows_the_difference_where_rows_are_hard_for_both() -> None:
    """Each row gains a tenth whatever it scored before: apart the two means overlap, in pairs the rise is certain."""
    before = [i / 50 for i in range(40)]
    after = [score + 0.1 for score in before]
    assert interval(before)[1] > interval(after)[0]
    assert paired_interval(before, after) == pytest.approx((0.1, 0.1))


def test_the_difference_of_equals_holds_nothing() -> None:
    low, high = paired_interval([0.0, 1.0] * 30, [1.0, 0.0] * 30)
    assert low < 0 < high
    with pytest.raises(ValueError, match="shorter"):
        paired_interval([1.0, 0.0], [1.0])
