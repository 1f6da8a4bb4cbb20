"""The loss from a head that is only there in slices of vocabulary: one that is in NF4, or in host memory.

Costs: the logits are made twice, once for their normaliser and once for the gradient, and every slice comes twice.

The normaliser of a softmax over slices is kept as a running maximum and sum (Milakov and Gimelshein 2018,
arXiv:1805.02867).

Letters: N labelled tokens, H hidden, V vocabulary, R rows of a vocabulary slice.
"""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from qtune.memory import memory_tracker
from qtune.memory.head_logits import PLAIN, MadeOf
from qtune.units import MIB

TILE_BYTES = 16 * MIB
TILE_ROWS = 128  # of a product that cuBLAS gives to one block: what goes beyond a multiple takes as long as a whole one


@dataclass(frozen=True)
class SlicedHead:
    """`parts` are rows that cover the vocabulary. `visits(times)` gives each of them with its weight (R, H) on the
    hidden states' device, all of them in their order so many times; a weight is there until the next is asked for."""

    parts: list[slice]
    visits: Callable[[int], Iterable[tuple[slice, torch.Tensor]]]


def tile_rows(most_bytes: int, columns: int) -> int:
    """Rows of a tile of logits that has so many `columns` in float32: a multiple of `TILE_ROWS`, and at least that."""
    return max(1, most_bytes // (4 * columns * TILE_ROWS)) * TILE_ROWS


def of_sliced_head(
    hidden: torch.Tensor,
    head: SlicedHead,
    labels: torch.Tensor,
    with_gradient: bool,
    made: MadeOf = PLAIN,
    of_each: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Summed loss of `hidden` (N, H) against `labels` (N,), or that `of_each` (N,), and its gradient (N, H); of the
    head's products the logits are `made`."""
    first = head.parts[0]
    tiles = memory_tracker.tiles(len(hidden), tile_rows(TILE_BYTES, first.stop - first.start), hidden)
    highest = torch.full((len(hidden),), -torch.inf, device=hidden.device)
    total, own = torch.zeros_like(highest), torch.zeros_like(highest)
    visits = iter(head.visits(2 if with_gradient else 1))
    for rows, weight in itertools.islice(visits, len(head.parts)):
        for tile in tiles:
            logits, _ = made.bend_((hidden[tile].to(weight.dtype) @ weight.t()).float(), with_slopes=False)
            here, index = _labels_in(labels[tile], rows)
            own[tile] += torch.where(here, logits.gather(1, index[:, None])[:, 0], 0.0)
            higher = torch.maximum(highest[tile], logits.amax(dim=1))
            below = logits.sub_(higher[:, None]).exp_().sum(dim=1)
            total[tile] = total[tile] * (highest[tile] - higher).exp() + below
            highest[tile] = higher
            del logits  # or the next tile's are made beside them
        del weight  # and the next slice beside this one
    normaliser = highest + total.log()
    nats = normaliser - own
    if not of_each:
        nats = nats.sum()
    return nats, _gradient(hidden, visits, labels, normaliser, tiles, made) if with_gradient else None


def _gradient(
    hidden: torch.Tensor,
    visits: Iterable[tuple[slice, torch.Tensor]],
    labels: torch.Tensor,
    normaliser: torch.Tensor,
    tiles: list[slice],
    made: MadeOf,
) -> torch.Tensor:
    """(softmax - one-hot) @ weight, summed over the slices in float32."""
    gradient = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    for rows, weight in visits:
        for tile in tiles:
            logits, slopes = made.bend_((hidden[tile].to(weight.dtype) @ weight.t()).float(), with_slopes=True)
            p = logits.sub_(normaliser[tile, None]).exp_()
            here, index = _labels_in(labels[tile], rows)
            p.scatter_add_(1, index[:, None], -here[:, None].float())
            gradient[tile] += made.back_(p, slopes).to(weight.dtype) @ weight
            del logits, p, slopes
        del weight
    return gradient.to(hidden.dtype)


def _labels_in(labels: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Which labels are rows of this slice, and where in it (0 for the others)."""
    here = (labels >= rows.start) & (labels < rows.stop)
    return here, torch.where(here, labels - rows.start, 0)
