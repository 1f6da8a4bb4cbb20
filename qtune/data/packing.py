"""Examples become full sequences that keep their document boundaries; sequences become batches without padding."""

import bisect
import heapq
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict, overload

import numpy
import torch

from qtune.data.dataset import Examples
from qtune.data.ragged import Ints, Ragged
from qtune.data.rows import NOT_TRAINED

CHUNK_ROWS = 1 << 16  # as Python's numbers at once


class PackedRow(TypedDict):
    """One sequence: the token ids and labels of its documents, joined, how long each document is, and what its trained
    tokens count for where they are not all alike."""

    input_ids: Sequence[int] | Ints
    labels: Sequence[int] | Ints
    seq_lengths: Sequence[int]
    weights: NotRequired[Sequence[float]]


class PackedRows(Sequence[PackedRow]):
    """The sequences that `packs` makes of `examples`, each put together when it is asked for."""

    def __init__(self, examples: Examples, packs: Ragged):
        self.examples, self.packs = examples, packs

    def __len__(self) -> int:
        return len(self.packs)

    @overload
    def __getitem__(self, at: int) -> PackedRow: ...
    @overload
    def __getitem__(self, at: slice) -> "PackedRows": ...
    def __getitem__(self, at: int | slice) -> "PackedRow | PackedRows":
        if isinstance(at, slice):
            return PackedRows(self.examples, self.packs[at])
        ids, labels = zip(*(self.examples.arrays(i) for i in self.packs[at]), strict=True)
        row = PackedRow(
            input_ids=numpy.concatenate(ids),
            labels=numpy.concatenate(labels),
            seq_lengths=self._documents(at) if self.examples.are_pairs else [len(part) for part in ids],
        )
        if self.examples.weights is not None:
            row["weights"] = [self.examples.weight(i) for i in self.packs[at]]
        return row

    def _documents(self, at: int) -> list[int]:
        """How long those of a sequence of pairs are, two of each."""
        pairs = [self.examples[i] for i in self.packs[at]]
        return [length for pair in pairs for length in (pair.rejected_at, len(pair.input_ids) - pair.rejected_at)]

    @property
    def seq_lengths(self) -> Ragged:
        """What `seq_lengths` is in each row, without making the rows."""
        tokens = self.examples.tokens[self.packs.values]
        if not self.examples.are_pairs:
            return Ragged(tokens, self.packs.ends)
        at = self.examples.rejected_at[self.packs.values]
        return Ragged(numpy.stack([at, tokens - at], axis=1).ravel(), 2 * self.packs.ends)


def pack(lengths: Sequence[int] | Ints, max_tokens: int) -> Ragged:
    """Indices of documents per sequence, none over `max_tokens` tokens.

    Best-fit decreasing (Ding et al. 2024, arXiv:2404.10830): every document goes, whole, where the least room is left.
    Sequences come in the order of their first document.
    """
    lengths = numpy.asarray(lengths, numpy.int32)
    longest_first = numpy.argsort(-lengths, kind="stable")
    numbers = numpy.empty(len(lengths), numpy.int32)
    into = Sequences(max_tokens)
    for at in range(0, len(lengths), CHUNK_ROWS):
        some = longest_first[at : at + CHUNK_ROWS]
        numbers[some] = [into.take(length) for length in lengths[some].tolist()]
    return _by_first_member(numbers, into.count)


class Sequences:
    """Those that are being filled: `count` of them so far."""

    def __init__(self, max_tokens: int):
        self.max_tokens, self.count = max_tokens, 0
        self._rooms: list[int] = []  # tokens left in sequences that have room, sorted, each value once
        self._by_room: dict[int, list[int]] = defaultdict(list)  # the sequences with that much room, a heap

    def take(self, length: int) -> int:
        """The number of the sequence that a document of this length goes into: a new one where none has room."""
        place = bisect.bisect_left(self._rooms, length)
        if place < len(self._rooms):
            room = self._rooms[place]
            number = heapq.heappop(self._by_room[room])
            if not self._by_room[room]:
                del self._rooms[place], self._by_room[room]
        else:
            room, number = self.max_tokens, self.count
            self.count += 1
        if room > length:
            if not self._by_room[room - length]:
                bisect.insort(self._rooms, room - length)
            heapq.heappush(self._by_room[room - length], number)
        return number


def _by_first_member(numbers: Ints, count: int) -> Ragged:
    """`numbers` says of each document which of `count` sequences it is in."""
    first = numpy.empty(count, numpy.int32)
    first[numbers[::-1]] = numpy.arange(len(numbers), dtype=numpy.int32)[::-1]  # what is written last stays
    order = numpy.empty(count, numpy.int32)
    order[numpy.argsort(first)] = numpy.arange(count, dtype=numpy.int32)
    numbers = order[numbers]
    members = numpy.argsort(numbers, kind="stable").astype(numpy.int32)
    return Ragged(members, numpy.cumsum(numpy.bincount(numbers, minlength=count)))


def packed_rows(examples: Examples, packs: Sequence[Sequence[int]]) -> PackedRows:
    """The sequences that `packs` names, by index into `examples`."""
    return PackedRows(examples, Ragged.of(packs))


def seq_lengths(rows: Sequence[PackedRow]) -> Ragged:
    """How long the documents of each row are, in the rows' order."""
    return rows.seq_lengths if isinstance(rows, PackedRows) else Ragged.of(row["seq_lengths"] for row in rows)


def pack_apart(lengths: Ints, groups: Ints, max_tokens: int | None) -> Ragged:
    """The same, with the documents of each group in sequences of their own, those of the first group first; each
    document by itself where there is no `max_tokens`."""
    values, ends, held = [], [], 0
    for group in numpy.unique(groups):
        members = numpy.flatnonzero(groups == group)
        packs = pack(lengths[members], max_tokens) if max_tokens else Ragged.each_alone(len(members))
        values.append(members[packs.values])
        ends.append(held + packs.ends)
        held += len(members)
    if not values:
        return Ragged.each_alone(0)
    return Ragged(numpy.concatenate(values).astype(numpy.int32), numpy.concatenate(ends))


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A micro-batch as one row of N tokens: `input_ids`, `labels`, `position_ids` (1, N) and `document_lengths`; and
    `token_weights` (1, N) in float32 where its rows have weights.

    Positions start at 0 in every document, and a document's first token is never a label: nothing before it is its own.
    """
    lengths = tuple(length for row in rows for length in row["seq_lengths"])
    labels = _joined([row["labels"] for row in rows])
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    labels[positions == 0] = NOT_TRAINED
    batch = {
        "input_ids": _joined([row["input_ids"] for row in rows]),
        "labels": labels,
        "position_ids": positions,
        "document_lengths": lengths,
    }
    if "weights" in rows[0]:
        weights = torch.tensor([weight for row in rows for weight in row["weights"]])
        batch["token_weights"] = weights.repeat_interleave(torch.tensor(lengths))[None]
    return batch


def _joined(parts: Sequence[Sequence[int] | Ints]) -> torch.Tensor:
    """(1, N) in int64."""
    return torch.from_numpy(numpy.concatenate(parts).astype(numpy.int64))[None]
