"""Attention over packed documents without a mask.

Held less of: the T x T mask that SDPA would need to keep documents apart, and every padded position outside attention.
Costs: inside attention a document is padded to the next power of two, at most twice its tokens; and one SDPA call per
distinct power of two among the documents of a pack.
Refuses: soft-capped attention and learned sinks, which SDPA cannot express.

How: the documents of a pack lie one after another in a row of T tokens. Documents of like length are gathered into a
(documents, heads, longest, head_dim) batch and run causally. Padding stands on the right, where causality hides it, so
no mask is built and the flash kernels apply. No FlashAttention package is needed, and no token sees another document.
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
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from qtune.memory import memory_tracker

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
    sliding_window = settings.pop("sliding_window", None)
    if document_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    dropout, scaling = settings.get("dropout", 0.0), settings.get("scaling")
    assert sum(document_lengths) == query.shape[2], "document lengths must cover the row"
    if len(document_lengths) == 1:
        band = _sliding_band(query.shape[2], sliding_window, query.device)
        return _attend(query, key, value, band, dropout, scaling).transpose(1, 2).contiguous(), None
    buckets, back = bucket_documents(tuple(document_lengths), query.device)
    rows = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]  # (T, H or K, E)
    outputs = []
    for bucket in buckets:
        shape = bucket.positions.shape
        q, k, v = (
            row.index_select(0, bucket.positions.flatten()).unflatten(0, shape).transpose(1, 2) for row in rows
        )  # (D, H or K, S, E)
        band = _sliding_band(shape[1], sliding_window, query.device)
        attended = _attend(q, k, v, band, dropout, scaling)
        outputs.append(attended.transpose(1, 2).flatten(0, 1).index_select(0, bucket.real))
    return torch.cat(outputs).index_select(0, back)[None], None


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    band: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    """Causal attention (or within `band`) of (D, H, S, E) queries over (D, K, S, E) keys and values."""
    if memory_tracker.stands_for_card():
        return _CardAttention.apply(query, key, value, band)
    is_grouped = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(
        query, key, value, band, dropout, is_causal=band is None, scale=scaling, enable_gqa=is_grouped
    )


class _CardAttention(torch.autograd.Function):
    """What FlashAttention-2 holds on a card, for a forecast: no value is computed.

    Its backward pass takes a float32 copy of the queries' gradient, and for grouped heads gradients of keys and values
    for every query head (flash_attn's `mha_bwd`, as built into torch). A band is read as a bias in the queries' dtype.
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, band: torch.Tensor | None
    ) -> torch.Tensor:
        documents, heads, length, width = query.shape
        output = query.new_empty(documents, length, heads, width).transpose(1, 2)
        scores = query.new_empty(documents, heads, length, dtype=torch.float32)
        bias = None if band is None else band.to(query.dtype)
        ctx.save_for_backward(query, key, value, output, scores, bias)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        query, key, value, *_ = ctx.saved_tensors
        workspace = 4 * query.numel()
        if query.shape[1] != key.shape[1]:
            workspace += 2 * query.element_size() * query.numel()
        results = tuple(
            tensor.new_empty(tensor.transpose(1, 2).shape).transpose(1, 2) for tensor in (query, key, value)
        )
        memory_tracker.note_workspace("layer workspace", workspace)
        return *results, None


@dataclass(frozen=True)
class Bucket:
    """Documents of like length: `positions` (D, S) in the row, and which of the D * S flattened places are `real`."""

    positions: torch.Tensor
    real: torch.Tensor


@functools.lru_cache(maxsize=8)
def bucket_documents(lengths: tuple[int, ...], device: torch.device) -> tuple[list[Bucket], torch.Tensor]:
    """One bucket per power of two, and the (T,) index that brings their real places back into row order.

    Kept between calls, as every layer asks for the same pack. Padding repeats a document's last position. The indices
    are real ones also where everything else is fake: their values are what they are for.
    """
    with unset_fake_temporarily():
        return _bucket_documents(lengths, device)


def _bucket_documents(lengths: tuple[int, ...], device: torch.device) -> tuple[list[Bucket], torch.Tensor]:
    starts = [end - length for end, length in zip(accumulate(lengths), lengths, strict=True)]
    members: dict[int, list[int]] = defaultdict(list)
    for index, length in enumerate(lengths):
        members[(length - 1).bit_length()].append(index)
    buckets, order = [], []
    for indices in members.values():
        first = torch.tensor([starts[i] for i in indices])[:, None]
        size = torch.tensor([lengths[i] for i in indices])[:, None]
        offsets = torch.arange(int(size.max()))[None]
        positions = first + torch.minimum(offsets, size - 1)
        real = (offsets < size).flatten().nonzero().flatten()
        buckets.append(Bucket(positions.to(device), real.to(device)))
        order.append(positions.flatten()[real])
    return buckets, torch.cat(order).argsort().to(device)


def _sliding_band(longest: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """The (S, S) causal band of a sliding window, or None where the window reaches over the whole document."""
    if window is None or longest <= window:
        return None
    distance = torch.arange(longest, device=device)[:, None] - torch.arange(longest, device=device)[None]
    return (distance >= 0) & (distance < window)


def _mask_unless_packed(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    """No mask for a packed row; for any other what SDPA gets, which is none where plain causality will do."""
    if _row_is_packed.get() and attention_mask is None:
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, **kwargs)
