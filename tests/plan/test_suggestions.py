"""Sizes that are advised are enough when they are taken at their word."""

import pytest

from qtune.plan.suggestions import _rounded_up
from qtune.units import GIB, KIB, MIB, parse_bytes


@pytest.mark.parametrize(
    "size", [7.31 * GIB, 7.301 * GIB, 12.2 * GIB, 9.96 * GIB, GIB, 3.04 * MIB, 640.2 * MIB, 1.01 * KIB]
)
def test_a_size_is_rounded_up_and_by_no_more_than_is_written(size: float) -> None:
    """Rounded to the nearest, a run with the budget that was advised did not fit again."""
    told = _rounded_up(size)
    advised = parse_bytes(told)
    assert advised is not None
    assert size <= advised <= 1.1 * size
