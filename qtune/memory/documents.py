"""The documents of a packed row: how long they are, wherever one is within a pass, and those of like length together.

Letters: T tokens of the row, D documents of a bucket, S longest of them, P places of all buckets.
"""

import contextlib
import functools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

_documents: ContextVar[tuple[int, ...] | None] = ContextVar("_documents", default=None)


def documents_here() -> tuple[int, ...] | None:
    """How long the documents of the packed row are that is run now, or run again; None for any other row."""
    return _documents.get()


@contextlib.contextmanager
def documents_are(lengths: tuple[int, ...] | None) -> Iterator[None]:
    """Inside, `documents_here` says `lengths`."""
    outer = _documents.set(lengths)
    try:
        yield
    finally:
        _documents.reset(outer)


@dataclass(frozen=True)
class Buckets:
    """Documents of like length together, in P places: the `shapes` (D, S) of the buckets, one after another; the
    `positions` (P,) of the row that stand there; which place is the `real` one of each position, (T,); and which places
    only pad a document, (P,), None where none does."""

    shapes: tuple[tuple[int, int], ...]
    positions: torch.Tensor
    real: torch.Tensor
    padding: torch.Tensor | None

    def split(self, places: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(P, ...) as a (D, S, ...) for each bucket."""
        pieces = places.split([documents * longest for documents, longest in self.shapes])
        return tuple(piece.unflatten(0, shape) for piece, shape in zip(pieces, self.shapes, strict=True))

    def joined(self, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        """The same, back."""
        flat = [piece.flatten(0, 1) for piece in pieces]
        return flat[0] if len(flat) == 1 else torch.cat(flat)


def into_buckets(row: torch.Tensor, buckets: Buckets) -> tuple[torch.Tensor, ...]:
    """(T, ...) by position, as a (D, S, ...) for each bucket."""
    pieces: tuple[torch.Tensor, ...] = _IntoBuckets.apply(row, buckets)
    return pieces


def out_of_buckets(buckets: Buckets, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """The way back; what became of padding is dropped."""
    row: torch.Tensor = _OutOfBuckets.apply(buckets, *pieces)
    return row


class _IntoBuckets(torch.autograd.Function):
    """A gather both ways. Nothing has to be summed up: every position has one real place, and the gradient of padding
    is 0, as no real token sees it and nobody reads what it becomes (`_OutOfBuckets`).
    """

    @staticmethod
    def forward(ctx: Any, row: torch.Tensor, buckets: Buckets) -> tuple[torch.Tensor, ...]:
        ctx.buckets = buckets
        return buckets.split(row.index_select(0, buckets.positions))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.buckets.joined(gradients).index_select(0, ctx.buckets.real), None


class _OutOfBuckets(torch.autograd.Function):
    """Padding is dropped, so its gradient is 0."""

    @staticmethod
    def forward(ctx: Any, buckets: Buckets, *pieces: torch.Tensor) -> torch.Tensor:
        ctx.buckets = buckets
        return buckets.joined(pieces).index_select(0, buckets.real)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        buckets: Buckets = ctx.buckets
        places = gradient.index_select(0, buckets.positions)
        if buckets.padding is not None:
            places.masked_fill_(buckets.padding.view(-1, *[1] * (places.ndim - 1)), 0)
        return None, *buckets.split(places)


@functools.lru_cache(maxsize=8)
def bucket_documents(lengths: tuple[int, ...], device: torch.device) -> Buckets:
    """One bucket per power of two.

    Kept between calls, as every layer asks for the same pack. Padding repeats a document's last position. The indices
    are real ones also where everything else is fake: their values are what they are for.
    """
    with unset_fake_temporarily():
        return _bucket_documents(lengths, device)


def _bucket_documents(lengths: tuple[int, ...], device: torch.device) -> Buckets:
    starts = [end - length for end, length in zip(accumulate(lengths), lengths, strict=True)]
    members: dict[int, list[int]] = defaultdict(list)
    for index, length in enumerate(lengths):
        members[(length - 1).bit_length()].append(index)
    shapes, positions, padding = [], [], []
    for indices in members.values():
        first = torch.tensor([starts[i] for i in indices])[:, None]
        size = torch.tensor([lengths[i] for i in indices])[:, None]
        offsets = torch.arange(int(size.max()))[None]
        shapes.append((len(indices), offsets.shape[1]))
        positions.append((first + torch.minimum(offsets, size - 1)).flatten())
        padding.append((offsets >= size).flatten())
    every, is_padding = torch.cat(positions), torch.cat(padding)
    real = (~is_padding).nonzero().flatten()
    real = real[every[real].argsort()]
    pads = is_padding.to(device) if is_padding.any() else None
    return Buckets(tuple(shapes), every.to(device), real.to(device), pads)
