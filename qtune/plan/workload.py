"""What there is to train on, as far as memory and time are concerned: how long the documents of each sequence are."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, overload

import numpy

from qtune.data.ragged import Ints, Ragged


@dataclass(frozen=True)
class BatchShape:
    """What one forward pass is fed: the lengths of its documents in tokens, and how many tokens have a label."""

    document_lengths: tuple[int, ...]
    labelled: int

    @property
    def tokens(self) -> int:
        return sum(self.document_lengths)

    @classmethod
    def of_one_document(cls, tokens: int) -> "BatchShape":
        return cls((tokens,), tokens - 1)


class BatchShapes(Sequence[BatchShape]):
    """Of very many sequences: of each the lengths of its documents, and how many tokens have a label."""

    def __init__(self, document_lengths: Ragged, labelled: Ints):
        self.document_lengths, self.labelled = document_lengths, labelled

    @classmethod
    def of(cls, shapes: Sequence[BatchShape]) -> "BatchShapes":
        if isinstance(shapes, BatchShapes):
            return shapes
        labelled = numpy.array([shape.labelled for shape in shapes], numpy.int64)
        return cls(Ragged.of(shape.document_lengths for shape in shapes), labelled)

    def __len__(self) -> int:
        return len(self.labelled)

    @overload
    def __getitem__(self, at: int) -> BatchShape: ...
    @overload
    def __getitem__(self, at: slice) -> "BatchShapes": ...
    def __getitem__(self, at: int | slice) -> "BatchShape | BatchShapes":
        if isinstance(at, slice):
            return BatchShapes(self.document_lengths[at], self.labelled[at])
        return BatchShape(self.document_lengths[at], int(self.labelled[at]))


@dataclass(frozen=True)
class Work:
    """One BatchShape for each training sequence. `is_assumed`: the data was not read, every sequence is taken to be
    full."""

    sequences: Sequence[BatchShape]
    is_assumed: bool = False

    @classmethod
    def of_rows(cls, rows: Iterable[Mapping[str, Any]]) -> "Work":
        """Of packed rows, which have `seq_lengths` and `labels`."""
        return cls(
            tuple(BatchShape(tuple(row["seq_lengths"]), _labelled(row["labels"], row["seq_lengths"])) for row in rows)
        )

    @classmethod
    def of_packs(cls, lengths: Iterable[Sequence[int]], packs: Iterable[Sequence[int]], trained: Ints) -> "Work":
        """Of sequences whose documents have these `lengths`, and which are made of the rows in each of `packs`, by
        their numbers; of each row how many tokens are `trained` on."""
        members = Ragged.of(packs)
        return cls(BatchShapes(Ragged.of(lengths), members.sums(numpy.asarray(trained)[members.values])))

    @classmethod
    def of_full_sequences(cls, tokens: int) -> "Work":
        return cls((BatchShape.of_one_document(tokens),), is_assumed=True)

    @cached_property
    def _shapes(self) -> BatchShapes:
        return BatchShapes.of(self.sequences)

    @property
    def tokens(self) -> int:
        return int(self._shapes.document_lengths.values.sum(dtype=numpy.int64))

    @property
    def squared_tokens(self) -> int:
        """The sum over documents of their length squared, to which attention's work is in proportion."""
        lengths = self._shapes.document_lengths.values.astype(numpy.int64)
        return int((lengths * lengths).sum())

    @property
    def mean_tokens(self) -> float:
        return self.tokens / len(self.sequences)

    @property
    def document_tokens(self) -> float:
        """The length of a token's document, the mean over tokens."""
        return self.squared_tokens / max(1, self.tokens)

    @cached_property
    def _heaviest_first(self) -> Ints:
        return heaviest_first(self._shapes.document_lengths)

    def heaviest(self, micro_batch: int) -> BatchShape:
        """The largest batch that `micro_batch` sequences can make; of equal ones that of the longest documents."""
        order = self._heaviest_first
        numbers = [order[i % len(order)] for i in range(micro_batch)] if self.is_assumed else order[:micro_batch]
        chosen = [self._shapes[int(number)] for number in numbers]
        lengths = tuple(length for sequence in chosen for length in sequence.document_lengths)
        return BatchShape(lengths, sum(sequence.labelled for sequence in chosen))


def heaviest_first(sequences: Ragged) -> Ints:
    """Numbers of sequences, whose documents have these lengths: of most tokens first, of equal ones that of the longest
    document. `Work.heaviest` is a forecast of the first ones."""
    return numpy.lexsort((-sequences.largest(), -sequences.sums()))


def _labelled(labels: Iterable[int], lengths: Sequence[int]) -> int:
    """Labels that something is predicted for, which are no negative number: a document's first token is never one."""
    starts, position = set(), 0
    for length in lengths:
        starts.add(position)
        position += length
    return sum(label >= 0 for i, label in enumerate(labels) if i not in starts)
