"""Many short lists of numbers in two arrays: eight bytes a number at the most, where a list of tuples takes ten times
that."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy
from numpy.typing import NDArray

Ints = NDArray[numpy.integer[Any]]


class Ragged(Sequence[tuple[int, ...]]):
    """List i is what stands in `values` up to `ends[i]`, from where the list before it ended."""

    def __init__(self, values: Ints, ends: Ints):
        self.values, self.ends = values, ends

    @classmethod
    def of(cls, lists: Iterable[Sequence[int]]) -> "Ragged":
        if isinstance(lists, Ragged):
            return lists
        kept = list(lists)
        values = numpy.fromiter(itertools.chain.from_iterable(kept), numpy.int64)
        return cls(values, numpy.cumsum(numpy.fromiter(map(len, kept), numpy.int64)))

    @classmethod
    def each_alone(cls, count: int) -> "Ragged":
        """The numbers up to `count`, a list each."""
        numbers = numpy.arange(count, dtype=numpy.int32)
        return cls(numbers, numbers + 1)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, at: int) -> tuple[int, ...]: ...
    @overload
    def __getitem__(self, at: slice) -> "Ragged": ...
    def __getitem__(self, at: int | slice) -> "tuple[int, ...] | Ragged":
        if isinstance(at, slice):
            return Ragged.of([self[i] for i in range(len(self))[at]])
        at = range(len(self))[at]
        return tuple(self.values[self.ends[at - 1] if at else 0 : self.ends[at]].tolist())

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        return map(self.__getitem__, range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(self) != len(other):
            return False
        return all(mine == tuple(theirs) for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def sums(self, of_each: Ints | None = None) -> Ints:
        """Of each list the sum of its numbers, or of what `of_each` has in their places."""
        until = numpy.append(0, numpy.cumsum(self.values if of_each is None else of_each, dtype=numpy.int64))
        return numpy.diff(until[numpy.append(0, self.ends)])

    def largest(self) -> Ints:
        """The largest number of each list, none of which is empty."""
        if not len(self):
            return numpy.zeros(0, numpy.int64)
        largest: Ints = numpy.maximum.reduceat(self.values, numpy.append(0, self.ends[:-1]))
        return largest
