"""What there is to train on, as far as memory and time are concerned: how long the documents of each sequence are."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any


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


@dataclass(frozen=True)
class Work:
    """One BatchShape for each training sequence. `is_assumed`: the data was not read, every sequence is taken to be
    full."""

    sequences: tuple[BatchShape, ...]
    is_assumed: bool = False

    @classmethod
    def of_rows(cls, rows: Iterable[Mapping[str, Any]]) -> "Work":
        """Of packed rows, which have `seq_lengths` and `labels`."""
        return cls(
            tuple(BatchShape(tuple(row["seq_lengths"]), _labelled(row["labels"], row["seq_lengths"])) for row in rows)
        )

    @classmethod
    def of_packs(cls, packs: Iterable[Sequence[int]], tokens: Sequence[int], trained: Sequence[int]) -> "Work":
        """Of sequences made of the documents in each of `packs`, by their numbers; of each document how many `tokens`
        it has, and how many of them are `trained` on."""
        return cls(tuple(BatchShape(tuple(tokens[i] for i in pack), sum(trained[i] for i in pack)) for pack in packs))

    @classmethod
    def of_full_sequences(cls, tokens: int) -> "Work":
        return cls((BatchShape.of_one_document(tokens),), is_assumed=True)

    @property
    def mean_tokens(self) -> float:
        return sum(sequence.tokens for sequence in self.sequences) / len(self.sequences)

    @cached_property
    def document_tokens(self) -> float:
        """The length of a token's document, the mean over tokens."""
        lengths = [length for sequence in self.sequences for length in sequence.document_lengths]
        return sum(length * length for length in lengths) / max(1, sum(lengths))

    @cached_property
    def _heaviest_first(self) -> list[BatchShape]:
        return [self.sequences[i] for i in heaviest_first([each.document_lengths for each in self.sequences])]

    def heaviest(self, micro_batch: int) -> BatchShape:
        """The largest batch that `micro_batch` sequences can make; of equal ones that of the longest documents."""
        order = self._heaviest_first
        chosen = [order[i % len(order)] for i in range(micro_batch)] if self.is_assumed else order[:micro_batch]
        lengths = tuple(length for sequence in chosen for length in sequence.document_lengths)
        return BatchShape(lengths, sum(sequence.labelled for sequence in chosen))


def heaviest_first(sequences: Sequence[Sequence[int]]) -> list[int]:
    """Numbers of sequences, whose documents have these lengths: of most tokens first, of equal ones that of the longest
    document. `Work.heaviest` is a forecast of the first ones."""
    return sorted(range(len(sequences)), key=lambda i: (-sum(sequences[i]), -max(sequences[i])))


def _labelled(labels: Iterable[int], lengths: Sequence[int]) -> int:
    """Labels that something is predicted for, which are no negative number: a document's first token is never one."""
    starts, position = set(), 0
    for length in lengths:
        starts.add(position)
        position += length
    return sum(label >= 0 for i, label in enumerate(labels) if i not in starts)
