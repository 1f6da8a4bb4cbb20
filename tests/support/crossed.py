"""Axes of a parametrised test, crossed: every value of each is met at once, every combination with --all."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest


def crossed(*axes: Sequence[Any]) -> list[Any]:
    """All combinations of a value of each axis, where a tuple stands for several arguments; those beside the diagonal
    are long."""
    diagonal = {tuple(i % len(axis) for axis in axes) for i in range(max(map(len, axes)))}
    cases = []
    for places in itertools.product(*(range(len(axis)) for axis in axes)):
        values = [axis[place] for axis, place in zip(axes, places, strict=True)]
        flat = [each for value in values for each in (value if isinstance(value, tuple) else (value,))]
        cases.append(pytest.param(*flat, marks=[] if places in diagonal else [pytest.mark.long]))
    return cases
