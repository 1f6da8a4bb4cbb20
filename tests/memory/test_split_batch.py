"""Pieces of a batch: whole documents, in order, evenly."""

import random
from itertools import pairwise

import pytest
import torch

from qtune.data.packing import collate
from qtune.memory.split_batch import cut_documents, split_batch


def batch_of(lengths: list[int]) -> dict:
    tokens = sum(lengths)
    return collate([{"input_ids": list(range(tokens)), "labels": list(range(tokens)), "seq_lengths": lengths}])


@pytest.mark.parametrize("pieces", [1, 2, 3, 4, 8])
def test_pieces_joined_are_the_batch(pieces) -> None:
    batch = batch_of([5, 1, 9, 2, 2])
    parts = split_batch(batch, pieces)
    assert len(parts) == min(pieces, 5)
    for name in ("input_ids", "labels", "position_ids"):
        assert torch.equal(torch.cat([part[name] for part in parts], dim=1), batch[name])
    assert sum((part["document_lengths"] for part in parts), ()) == batch["document_lengths"]
    for part in parts:
        assert sum(part["document_lengths"]) == part["input_ids"].shape[1]
        assert part["position_ids"][0, 0] == 0


@pytest.mark.parametrize(
    ("lengths", "pieces", "cuts"),
    [
        ([10], 4, [0, 1]),
        ([10, 10, 10, 10], 2, [0, 2, 4]),
        ([100, 10, 10, 10], 2, [0, 1, 4]),
        ([100, 10, 10, 10], 4, [0, 1, 2, 3, 4]),
        ([10, 10, 100], 2, [0, 2, 3]),
        ([3, 3, 3, 3, 3, 3, 3, 3], 4, [0, 2, 4, 6, 8]),
        ([10, 10, 10, 10, 10, 35, 30], 3, [0, 5, 6, 7]),  # of most tokens, not of most documents
    ],
)
def test_the_longest_piece_is_cut_nearest_its_middle(lengths, pieces, cuts) -> None:
    assert cut_documents(lengths, pieces) == cuts


def test_twice_the_pieces_are_cuts_of_the_same_pieces_until_each_is_a_document() -> None:
    rng = random.Random(0)
    for _ in range(300):
        lengths = [rng.randint(1, 300) for _ in range(rng.randint(1, 40))]
        coarse = [cut_documents(lengths, 2**n) for n in range(7)]
        assert all(set(a) <= set(b) for a, b in pairwise(coarse))
        assert [len(cuts) - 1 for cuts in coarse] == [min(2**n, len(lengths)) for n in range(7)]
        largest = max(sum(lengths[a:b]) for a, b in pairwise(cut_documents(lengths, 2)))
        assert largest <= (sum(lengths) + max(lengths)) / 2
