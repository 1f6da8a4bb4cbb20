"""A packed batch in pieces: whole documents, about equal tokens, the same loss.

Held less of: everything a pass makes; its peak is that of the largest piece, down to the longest document.
Costs: one pass a piece, so small pieces leave a card idle; no arithmetic is done twice.
Refuses: nothing; a batch has no more pieces than documents, or than groups of those that belong together.
"""

from bisect import insort
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch


def split_batch(batch: Mapping[str, Any], pieces: int, together: int = 1) -> list[dict[str, Any]]:
    """`batch` (of `data.packing.collate`, tensors of (1, N)) as min(`pieces`, its documents) batches, in order; so many
    documents one after another stay `together`.

    No token sees another document and none predicts across a boundary, so summed losses and gradients add up to those
    of `batch`. Twice the pieces are cuts of the same pieces.
    """
    lengths = batch["document_lengths"]
    ends = [0, *accumulate(lengths)]
    groups = [sum(lengths[first : first + together]) for first in range(0, len(lengths), together)]
    cuts = [min(together * cut, len(lengths)) for cut in cut_documents(groups, pieces)]
    return [
        {
            **{name: _cut(value, ends[first], ends[last]) for name, value in batch.items()},
            "document_lengths": tuple(lengths[first:last]),
        }
        for first, last in pairwise(cuts)
    ]


def _cut(value: Any, start: int, end: int) -> Any:
    return value[:, start:end] if isinstance(value, torch.Tensor) else value


def cut_documents(lengths: Sequence[int], pieces: int) -> list[int]:
    """Where to cut documents of these lengths, both ends included: always the longest piece, nearest its middle."""
    ends = [0, *accumulate(lengths)]
    cuts = [0, len(lengths)]
    while len(cuts) <= min(pieces, len(lengths)):
        first, last = max(
            (piece for piece in pairwise(cuts) if piece[1] - piece[0] > 1),
            key=lambda piece: ends[piece[1]] - ends[piece[0]],
        )
        insort(cuts, min(range(first + 1, last), key=lambda i: abs(2 * ends[i] - ends[first] - ends[last])))
    return cuts
