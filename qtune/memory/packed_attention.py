"""Attention over packed documents without a mask.

Held less of: the T x T mask that SDPA would need to keep documents apart, and every padded position outside attention.
Costs: inside attention a document is padded to the next power of two, at most twice its tokens; and one SDPA call per
distinct power of two among the documents of a pack. Neither on a card that has `varlen_attn`.
Refuses: soft-capped attention and learned sinks, which SDPA cannot express.

How: the documents of a pack lie one after another in a row of T tokens. On a card torch's `varlen_attn` takes them as
they lie (`attention_kernels`). Elsewhere documents of like length are gathered into a (documents, heads, longest,
head_dim) batch and run causally. Padding stands on the right, where causality hides it, so no mask is built and the
flash kernels apply. No FlashAttention package is needed, and no token sees another document.
Rows that come without `document_lengths` (generation, verification, padded batches) get the mask that transformers
makes for its own SDPA, windows included.

Letters: T tokens of the row, D documents of a bucket, S longest of them, H query heads, K key/value heads, E head_dim.
"""

import functools
import types
from collections import defaultdict
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from qtune.memory import memory_tracker
from qtune.memory.attention_kernels import (
    Call,
    attend,
    attend_varlen,
    causal_band,
    needs_repeated_heads,
    repeat_heads,
    spans_of,
    suits_varlen,
    varlen_fault,
)

NAME = "qtune_documents"
_row_is_packed: ContextVar[bool] = ContextVar("_row_is_packed", default=False)


def register() -> None:
    """Make `attn_implementation="qtune_documents"` known to transformers."""
    AttentionInterface.register(NAME, document_attention)
    AttentionMaskInterface.register(NAME, _mask_unless_packed)


def install(model: PreTrainedModel) -> None:
    """Let the decoder of `model` make no mask for a row that comes with `document_lengths`, and its own for any other.

    The mask is made before a layer is reached, and what makes it is not told how the row is packed.
    """
    decoder: Any = model.base_model
    original = decoder.forward

    @functools.wraps(original)
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        outer = _row_is_packed.set(kwargs.get("document_lengths") is not None)
        try:
            return original(*args, **kwargs)
        finally:
            _row_is_packed.reset(outer)

    decoder.forward = types.MethodType(forward, decoder)


def document_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    document_lengths: Sequence[int] | None = None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each document of a packed row.

    `query` is (1, H, T, E), `key` and `value` (1, K, T, E); `document_lengths` sum to T. Returns (1, T, H, E) and no
    weights. Without `document_lengths` (generation, padded batches) it is transformers' own SDPA. `settings` are what a
    model of transformers says of its attention: dropout, scaling, sliding_window and others.
    """
    if settings.get("softcap") is not None or settings.get("s_aux") is not None:
        raise NotImplementedError("soft-capped attention and attention sinks need another attention implementation")
    if document_lengths is not None and settings.get("position_bias") is not None:
        raise NotImplementedError("its attention adds a bias by position, which packed attention does not")
    window, dropout, scaling = (
        settings.pop("sliding_window", None),
        settings.get("dropout", 0.0),
        settings.get("scaling"),
    )
    if document_lengths is None:
        return _attend_whole_rows(module, query, key, value, attention_mask, settings)
    lengths, device = tuple(document_lengths), query.device
    assert sum(lengths) == query.shape[2], "document lengths must cover the row"
    call = Call.of(query, key, value, dropout)
    if suits_varlen(call, lengths, window, memory_tracker.capability_for(query)) and _varlen_works(
        call, window, device
    ):
        query, key, value = (tensor.to(call.dtype) for tensor in (query, key, value))
        attended = attend_varlen(query, key, value, spans_of(lengths, window, device), scaling)
    elif len(lengths) == 1:
        attended = attend(query, key, value, _sliding_band(lengths[0], window, device), dropout, scaling)
    else:
        attended = _attend_buckets((query, key, value), bucket_documents(lengths, device), window, dropout, scaling)
    return attended.transpose(1, 2).contiguous(), None


def _attend_whole_rows(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    settings: dict[str, Any],
) -> tuple[torch.Tensor, None]:
    """transformers' own SDPA; on a card not math attention, where it would leave the heads of a row grouped."""
    call = Call.of(query, key, value, settings.get("dropout", 0.0), has_band=mask is not None)
    if mask is None and query.shape[2] > 1 and needs_repeated_heads(call, memory_tracker.capability_for(query)):
        key, value = repeat_heads(key, call.heads), repeat_heads(value, call.heads)
        module = types.SimpleNamespace(is_causal=getattr(module, "is_causal", True))  # of a model that groups no heads
    return sdpa_attention_forward(module, query, key, value, mask, **settings)


def _varlen_works(call: Call, window: int | None, device: torch.device) -> bool:
    return memory_tracker.stands_for_card() or varlen_fault(call, window is not None, device) is None


def _attend_buckets(
    row: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    buckets: "Buckets",
    window: int | None,
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    """Queries, keys and values of a `row` of documents, attended bucket by bucket: (1, H, T, E)."""
    documents = zip(*(_IntoBuckets.apply(tensor.squeeze(0).transpose(0, 1), buckets) for tensor in row), strict=True)
    outputs = []
    for three in documents:
        query, key, value = (tensor.transpose(1, 2) for tensor in three)  # (D, H or K, S, E)
        band = _sliding_band(query.shape[2], window, query.device)
        outputs.append(attend(query, key, value, band, dropout, scaling).transpose(1, 2))
    attended: torch.Tensor = _OutOfBuckets.apply(buckets, *outputs)
    return attended.transpose(0, 1).unsqueeze(0)


@dataclass(frozen=True)
class Buckets:
    """Documents of like length together, in P places: the `shapes` (D, S) of the buckets, one after another; the
    `positions` (P,) of the row that stand there; which place is the `real` one of each position, (T,); and which places
    only pad a document, (P, 1, 1), None where none does."""

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


class _IntoBuckets(torch.autograd.Function):
    """(T, ...) by position, as a (D, S, ...) for each bucket.

    A gather both ways. Nothing has to be summed up: every position has one real place, and the gradient of padding is
    0, as no real token sees it and nobody reads what it becomes (`_OutOfBuckets`).
    """

    @staticmethod
    def forward(ctx: Any, row: torch.Tensor, buckets: Buckets) -> tuple[torch.Tensor, ...]:
        ctx.buckets = buckets
        return buckets.split(row.index_select(0, buckets.positions))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.buckets.joined(gradients).index_select(0, ctx.buckets.real), None


class _OutOfBuckets(torch.autograd.Function):
    """The way back; padding is dropped, so its gradient is 0."""

    @staticmethod
    def forward(ctx: Any, buckets: Buckets, *pieces: torch.Tensor) -> torch.Tensor:
        ctx.buckets = buckets
        return buckets.joined(pieces).index_select(0, buckets.real)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        buckets: Buckets = ctx.buckets
        places = gradient.index_select(0, buckets.positions)
        if buckets.padding is not None:
            places.masked_fill_(buckets.padding, 0)
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
    pads = is_padding[:, None, None].to(device) if is_padding.any() else None
    return Buckets(tuple(shapes), every.to(device), real.to(device), pads)


def _sliding_band(longest: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """The (S, S) causal band of a sliding window, or None where the window reaches over the whole document."""
    return None if window is None or longest <= window else causal_band(longest, window, device)


def _mask_unless_packed(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    """No mask for a packed row; for any other what SDPA gets, which is none where plain causality will do."""
    if _row_is_packed.get() and attention_mask is None:
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, **kwargs)
