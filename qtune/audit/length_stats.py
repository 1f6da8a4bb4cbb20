"""How long rows are, in tokens: eight bytes a row, and what is told of them."""

from array import array
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

SHOWN_LONGEST = 3
Numbers = NDArray[numpy.int64]


@dataclass(frozen=True)
class Bar:
    """Rows of `low` to `high` tokens, both included."""

    low: int
    high: int
    rows: int


@dataclass(frozen=True)
class LongRow:
    """A place and how many tokens stand there."""

    place: str
    tokens: int


@dataclass(frozen=True)
class TokenCounts:
    """All rows that have tokens, before any is cut or dropped. Fractions are of 0-1, `bars` double in width."""

    rows: int
    tokens: int
    trained_tokens: int
    median: int
    percentile_95: int
    longest: tuple[LongRow, ...]
    max_tokens: int
    long_rows: int
    lost_trained_tokens: int
    bars: tuple[Bar, ...]


def bars_of(tokens: Numbers) -> tuple[Bar, ...]:
    """Rows counted by powers of two: 1, 2, 3-4, 5-8 and so on, from the shortest row's bar to the longest row's."""
    counts = numpy.bincount(numpy.ceil(numpy.log2(numpy.maximum(tokens, 1))).astype(int))
    used = numpy.flatnonzero(counts)
    return tuple(
        Bar(2 ** (power - 1) + 1 if power else 0, 2**power, int(counts[power]))
        for power in range(int(used[0]), int(used[-1]) + 1)
    )


def as_numbers(counts: array) -> Numbers:
    return numpy.frombuffer(counts, numpy.uint32).astype(numpy.int64)
