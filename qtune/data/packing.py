"""Examples become full sequences that keep their document boundaries; sequences become batches without padding."""

import bisect
import heapq
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import torch

from qtune.data.tokens import NOT_TRAINED, Example


class PackedRow(TypedDict):
    """One sequence: the token ids and labels of its documents, joined, and how long each document is."""

    input_ids: list[int]
    labels: list[int]
    seq_lengths: list[int]


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


def packed_rows(examples: Sequence[Example], packs: Sequence[Sequence[int]]) -> list[PackedRow]:
    """The sequences that `packs` names, as rows a dataset can hold."""
    return [
        {
            "input_ids": [token for i in members for token in examples[i].input_ids],
            "labels": [label for i in members for label in examples[i].labels],
            "seq_lengths": [len(examples[i].input_ids) for i in members],
        }
        for members in packs
    ]


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A micro-batch as one row of N tokens: `input_ids`, `labels`, `position_ids` (1, N) and `document_lengths`.

    Positions start at 0 in every document, and a document's first token is never a label: nothing before it is its own.
    """
    lengths = tuple(length for row in rows for length in row["seq_lengths"])
    labels = torch.tensor([[label for row in rows for label in row["labels"]]])
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    labels[positions == 0] = NOT_TRAINED
    return {
        "input_ids": torch.tensor([[token for row in rows for token in row["input_ids"]]]),
        "labels": labels,
        "position_ids": positions,
        "document_lengths": lengths,
    }
