"""What there is to train on, as far as memory and time are concerned: how long the documents of each sequence are."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from qtune.data.packing import PackedRow, seq_lengths
from qtune.data.prepare import Prepared
from qtune.data.rows import NOT_TRAINED
from qtune.plan.fake_step import Batch


@dataclass(frozen=True)
class Work:
    """One Batch for each training sequence. `is_assumed`: the data was not read, every sequence is taken to be full."""

    sequences: tuple[Batch, ...]
    is_assumed: bool = False

    @classmethod
    def of_rows(cls, rows: Sequence[PackedRow]) -> "Work":
        return cls(
            tuple(Batch(tuple(row["seq_lengths"]), _labelled(row["labels"], row["seq_lengths"])) for row in rows)
        )

    @classmethod
    def of_prepared(cls, prepared: Prepared) -> "Work":
        tokens, trained = prepared.train.tokens.tolist(), prepared.train.trained_tokens.tolist()
        return cls(
            tuple(Batch(tuple(tokens[i] for i in pack), sum(trained[i] for i in pack)) for pack in prepared.train_packs)
        )

    @classmethod
    def of_full_sequences(cls, tokens: int) -> "Work":
        return cls((Batch.of_one_document(tokens),), is_assumed=True)

    @property
    def mean_tokens(self) -> float:
        return sum(sequence.tokens for sequence in self.sequences) / len(self.sequences)

    @cached_property
    def _heaviest_first(self) -> list[Batch]:
        return sorted(self.sequences, key=lambda sequence: heaviest_first(sequence.document_lengths))

    def heaviest(self, micro_batch: int) -> Batch:
        """The largest batch that `micro_batch` sequences can make; of equal ones that of the longest documents."""
        order = self._heaviest_first
        chosen = [order[i % len(order)] for i in range(micro_batch)] if self.is_assumed else order[:micro_batch]
        lengths = tuple(length for sequence in chosen for length in sequence.document_lengths)
        return Batch(lengths, sum(sequence.labelled for sequence in chosen))


def heaviest_first(document_lengths: Sequence[int]) -> tuple[int, int]:
    """What sequences are sorted by: most tokens first, of equal ones that of the longest document."""
    return -sum(document_lengths), -max(document_lengths)


def largest_rows(rows: Sequence[PackedRow], micro_batch: int) -> list[PackedRow]:
    """The `micro_batch` heaviest of `rows`, which `Work.heaviest` is a forecast of."""
    lengths = seq_lengths(rows)
    order = sorted(range(len(rows)), key=lambda i: heaviest_first(lengths[i]))
    return [rows[i] for i in order[:micro_batch]]


def _labelled(labels: Iterable[int], lengths: Sequence[int]) -> int:
    """Labels that something is predicted for: a document's first token is never one."""
    starts, position = set(), 0
    for length in lengths:
        starts.add(position)
        position += length
    return sum(label != NOT_TRAINED for i, label in enumerate(labels) if i not in starts)
