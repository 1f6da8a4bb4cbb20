"""Attention over packed documents without a mask.

Held less of: the T x T mask that SDPA would need to keep documents apart, and every padded position outside attention.
Costs: inside attention a document is padded to the next power of two, at most twice its tokens; and one SDPA call per
distinct power of two among the documents of a pack. Neither on a card that has `varlen_attn`.
Refuses: biases by position, and dropout of weights beside a cap or sinks.

How: the documents of a pack lie one after another in a row of T tokens. On a card torch's `varlen_attn` takes them as
they lie (`attention_kernels`). Elsewhere documents of like length are gathered into a (documents, heads, longest,
head_dim) batch and run causally. Padding stands on the right, where causality hides it, so no mask is built and the
flash kernels apply. No FlashAttention package is needed, and no token sees another document. A layer that attends in
chunks is given documents of that length, as none of their tokens sees beyond its chunk. Sinks go where a kernel of
flash attention gives its normaliser away (`attention_kernels`); capped scores, and sinks elsewhere, to
`tiled_attention`.
Rows that come without `document_lengths` (generation, verification, padded batches) get the mask that transformers
makes for its own SDPA, windows included.

Letters: T tokens of the row, D documents of a bucket, S longest of them, H query heads, K key/value heads, E head_dim.
"""

import functools
import inspect
import types
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from qtune.memory import kept_attention, memory_tracker
from qtune.memory.attention_kernels import (
    Call,
    attend,
    attend_varlen,
    attend_with_sinks,
    causal_band,
    needs_repeated_heads,
    repeat_heads,
    spans_of,
    suits_varlen,
    varlen_fault,
)
from qtune.memory.documents import (
    Buckets,
    bucket_documents,
    documents_are,
    documents_here,
    into_buckets,
    out_of_buckets,
)
from qtune.memory.head_logits import decoder_of
from qtune.memory.packed_mixers import runs_as_a_whole
from qtune.memory.tiled_attention import Scores, attend_in_tiles

NAME = "qtune_documents"


def register() -> None:
    """Make `attn_implementation="qtune_documents"` known to transformers."""
    AttentionInterface.register(NAME, document_attention)
    AttentionMaskInterface.register(NAME, _mask_unless_packed)


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The causal model of transformers that `config` describes; None for code that comes with a base."""
    return AutoModelForCausalLM._model_mapping.get(type(config), None)


def implementation_for(config: PreTrainedConfig) -> str | None:
    """What the model is to be told as `attn_implementation`: ours, or nothing where it is left with its own."""
    kind = model_class(config)
    return None if kind is not None and runs_as_a_whole(kind) else NAME


def install(model: PreTrainedModel) -> None:
    """Let `model` know, wherever it is within a pass, how long the documents of the row are (`documents_here`).

    A row that comes with `document_lengths` then gets no mask, any other its own; and a model whose code does not hand
    keywords on keeps documents apart like any other.
    """
    for module in dict.fromkeys((model, model.base_model, decoder_of(model))):
        _know_documents(module, is_decoder=module is not model)


def _know_documents(module: Any, is_decoder: bool) -> None:
    original = module.forward
    parameters = inspect.signature(original).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())

    @functools.wraps(original)
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        lengths = kwargs.get("document_lengths")
        if not takes_any:
            kwargs.pop("document_lengths", None)
        if is_decoder and isinstance(kept := kwargs.get("logits_to_keep"), int) and kept > 1:
            kwargs["logits_to_keep"] = (
                0  # or Gemma 4 asks fewer queries than keys, and a row without a mask starts anew
            )
        with documents_are(documents_here() if lengths is None else tuple(lengths)):
            return original(*args, **kwargs)

    module.forward = types.MethodType(forward, module)


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
    weights. `document_lengths` are those of `documents_here` unless given; without (generation, padded batches) it is
    transformers' own SDPA. `settings` are what a model of transformers says of its attention: dropout, scaling,
    sliding_window and others.
    """
    document_lengths = document_lengths or documents_here()
    settings.setdefault("sliding_window", _window_of_mask(module))
    how = Asked.of(settings)
    if document_lengths is None:
        return _attend_whole_rows(module, query, key, value, attention_mask, settings, how)
    if settings.get("position_bias") is not None:
        raise NotImplementedError("its attention adds a bias by position, which packed attention does not")
    if key.shape[2] != query.shape[2]:
        raise NotImplementedError("its attention sees keys that stand for several tokens, of whichever documents")
    lengths, device = _chunked(module, tuple(document_lengths)), query.device
    assert sum(lengths) == query.shape[2], "document lengths must cover the row"
    call = replace(Call.of(query, key, value, how.dropout), has_sinks=how.sinks is not None)
    if how.cap is None and (
        suits_varlen(call, lengths, how.window, memory_tracker.capability_for(query))
        and _varlen_works(call, how.window, device)
    ):
        query, key, value = (tensor.to(call.dtype) for tensor in (query, key, value))
        spans = spans_of(lengths, how.window, device)
        with kept_attention.one_call():
            attended = attend_varlen(query, key, value, spans, how.scaling, how.sinks)
    elif len(lengths) == 1:
        attended = how.attend(query, key, value)
    else:
        attended = _attend_buckets((query, key, value), bucket_documents(lengths, device), how)
    return attended.transpose(1, 2).contiguous(), None


def _window_of_mask(module: Any) -> int | None:
    """The window of layers that have it in their mask and hand none on (transformers 5.23)."""
    kind = getattr(getattr(module, "config", None), "model_type", None)
    if kind == "phimoe":
        return cast(int | None, module.config.sliding_window)
    return getattr(module, "sliding_window", None) if kind == "qwen2_moe" else None


@dataclass(frozen=True)
class Asked:
    """What a model asks of its attention beside queries, keys and values: `cap` is tanh's on the scores, `sinks` (H,) a
    score of each head without a value, `window` how many tokens one sees, itself among them."""

    dropout: float
    scaling: float | None
    window: int | None
    cap: float | None
    sinks: torch.Tensor | None

    @classmethod
    def of(cls, settings: dict[str, Any]) -> "Asked":
        """Taken out of a call's `settings`, which keep dropout and scaling."""
        window, cap, sinks = (settings.pop(name, None) for name in ("sliding_window", "softcap", "s_aux"))
        return cls(settings.get("dropout", 0.0), settings.get("scaling"), window, cap, sinks)

    @kept_attention.one_call()
    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Causal attention, within the window, of (D, H, S, E) queries."""
        if self.cap is not None:
            return self.in_tiles(query, key, value, None)
        if self.sinks is not None:
            self._refuse_dropout()
            return attend_with_sinks(query, key, value, self.sinks, self.window, self.scaling)
        band = _sliding_band(query.shape[2], self.window, query.device)
        return attend(query, key, value, band, self.dropout, self.scaling)

    def in_tiles(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        self._refuse_dropout()
        scaling = query.shape[-1] ** -0.5 if self.scaling is None else self.scaling
        return attend_in_tiles(query, key, value, self.sinks, Scores(scaling, self.cap, self.window, mask))

    def _refuse_dropout(self) -> None:
        if self.dropout > 0:
            raise NotImplementedError("its attention drops out weights beside a cap or sinks")


def _chunked(module: Any, lengths: tuple[int, ...]) -> tuple[int, ...]:
    """Documents as a layer of `module` sees them, which may attend in chunks only (Llama 4)."""
    config = getattr(module, "config", None)
    size = getattr(config, "attention_chunk_size", None)
    if config is None or not size or config.layer_types[module.layer_idx] != "chunked_attention":
        return lengths
    return tuple(min(size, length - start) for length in lengths for start in range(0, length, size))


def _attend_whole_rows(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    settings: dict[str, Any],
    how: Asked,
) -> tuple[torch.Tensor, None]:
    """transformers' own SDPA; on a card not math attention, where it would leave the heads of a row grouped."""
    if how.cap is not None or how.sinks is not None:
        if settings.get("position_bias") is not None:
            raise NotImplementedError("its attention adds a bias by position beside a cap or sinks")
        masked = replace(how, window=None)  # a mask has the window in it, and without one the row is no longer
        return masked.in_tiles(query, key, value, mask).transpose(1, 2).contiguous(), None
    call = Call.of(query, key, value, how.dropout, has_band=mask is not None)
    if mask is None and query.shape[2] > 1 and needs_repeated_heads(call, memory_tracker.capability_for(query)):
        key, value = repeat_heads(key, call.heads), repeat_heads(value, call.heads)
        module = types.SimpleNamespace(is_causal=getattr(module, "is_causal", True))  # of a model that groups no heads
    return sdpa_attention_forward(module, query, key, value, mask, **settings)


def _varlen_works(call: Call, window: int | None, device: torch.device) -> bool:
    return memory_tracker.stands_for_card() or varlen_fault(call, window is not None, device) is None


def _attend_buckets(
    row: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    buckets: Buckets,
    how: Asked,
) -> torch.Tensor:
    """Queries, keys and values of a `row` of documents, attended bucket by bucket: (1, H, T, E)."""
    documents = zip(*(into_buckets(tensor.squeeze(0).transpose(0, 1), buckets) for tensor in row), strict=True)
    outputs = []
    for three in documents:
        query, key, value = (tensor.transpose(1, 2) for tensor in three)  # (D, H or K, S, E)
        outputs.append(how.attend(query, key, value).transpose(1, 2))
    attended = out_of_buckets(buckets, outputs)
    return attended.transpose(0, 1).unsqueeze(0)


def _sliding_band(longest: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """The (S, S) causal band of a sliding window, or None where the window reaches over the whole document."""
    return None if window is None or longest <= window else causal_band(longest, window, device)


def _mask_unless_packed(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    """No mask for a packed row; for any other what SDPA gets, which is none where plain causality will do."""
    if documents_here() is not None and attention_mask is None:
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, **kwargs)
