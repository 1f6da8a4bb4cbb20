"""Examples become full sequences that keep their document boundaries; sequences become batches without padding."""

import bisect
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import torch

from qtune.data.tokens import Example


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
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    room: list[tuple[int, int]] = []  # (tokens left, sequence), sorted
    packs: list[list[int]] = []
    for index in order:
        place = bisect.bisect_left(room, (lengths[index], -1))
        if place == len(room):
            left, number = max_tokens, len(packs)
            packs.append([])
        else:
            left, number = room.pop(place)
        packs[number].append(index)
        bisect.insort(room, (left - lengths[index], number))
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
    labels[positions == 0] = -100
    return {
        "input_ids": torch.tensor([[token for row in rows for token in row["input_ids"]]]),
        "labels": labels,
        "position_ids": positions,
        "document_lengths": lengths,
    }
