"""Examples become full sequences that keep their document boundaries; sequences become batches without padding."""

import bisect
import heapq
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, overload

import numpy
import torch

from qtune.data.dataset import Examples, Ints
from qtune.data.rows import NOT_TRAINED


class PackedRow(TypedDict):
    """One sequence: the token ids and labels of its documents, joined, and how long each document is."""

    input_ids: Sequence[int] | Ints
    labels: Sequence[int] | Ints
    seq_lengths: Sequence[int]


class PackedRows(Sequence[PackedRow]):
    """The sequences that `packs` makes of `examples`, each put together when it is asked for."""

    def __init__(self, examples: Examples, packs: Sequence[Sequence[int]]):
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
        return {
            "input_ids": numpy.concatenate(ids),
            "labels": numpy.concatenate(labels),
            "seq_lengths": [len(part) for part in ids],
        }

    @property
    def seq_lengths(self) -> list[list[int]]:
        """What `seq_lengths` is in each row, without making the rows."""
        tokens = self.examples.tokens.tolist()
        return [[tokens[i] for i in members] for members in self.packs]


def pack(lengths: Sequence[int], max_tokens: int) -> list[tuple[int, ...]]:
    """Indices of documents per sequence, none over `max_tokens` tokens.

    Best-fit decreasing (Ding et al. 2024, arXiv:2404.10830): every document goes, whole, where the least room is left.
    Sequences come in the order of their first document.
    """
    packs: list[list[int]] = []
    rooms: list[int] = []  # tokens left in sequences that have room, sorted, each value once
    by_room: dict[int, list[int]] = defaultdict(list)  # the sequences with that much room, a heap
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect.bisect_left(rooms, lengths[index])
        if place < len(rooms):
            room = rooms[place]
            number = heapq.heappop(by_room[room])
            if not by_room[room]:
                del rooms[place]
        else:
            room, number = max_tokens, len(packs)
            packs.append([])
        packs[number].append(index)
        room -= lengths[index]
        if room > 0:
            if not by_room[room]:
                bisect.insort(rooms, room)
            heapq.heappush(by_room[room], number)
    return sorted(tuple(sorted(members)) for members in packs)


def packed_rows(examples: Examples, packs: Sequence[Sequence[int]]) -> PackedRows:
    """The sequences that `packs` names, by index into `examples`."""
    return PackedRows(examples, packs)


def seq_lengths(rows: Sequence[PackedRow]) -> list[Sequence[int]]:
    """How long the documents of each row are, in the rows' order."""
    return [*rows.seq_lengths] if isinstance(rows, PackedRows) else [row["seq_lengths"] for row in rows]


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A micro-batch as one row of N tokens: `input_ids`, `labels`, `position_ids` (1, N) and `document_lengths`.

    Positions start at 0 in every document, and a document's first token is never a label: nothing before it is its own.
    """
    lengths = tuple(length for row in rows for length in row["seq_lengths"])
    labels = _joined([row["labels"] for row in rows])
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    labels[positions == 0] = NOT_TRAINED
    return {
        "input_ids": _joined([row["input_ids"] for row in rows]),
        "labels": labels,
        "position_ids": positions,
        "document_lengths": lengths,
    }


def _joined(parts: Sequence[Sequence[int] | Ints]) -> torch.Tensor:
    """(1, N) in int64."""
    return torch.from_numpy(numpy.concatenate(parts).astype(numpy.int64))[None]
