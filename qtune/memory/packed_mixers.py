"""Token mixers other than attention over packed documents: recurrences, linear attention, short convolutions.

Held less of: nothing; documents are kept apart, which these modules cannot do by themselves.
Costs: inside a mixer a document is padded to the longest of its bucket, at most twice its tokens; one call of the mixer
for each distinct power of two among the documents of a pack.
Refuses: nothing, but where the whole decoder is run in buckets no inputs of layers go to host memory. A mixer that
cannot be run in buckets is left as it is, and `model.packing_probe` finds the leak.

How: as in `memory.packed_attention`. Documents of like length are gathered into a (documents, longest, hidden) batch,
which the module's own forward takes like any other; padding stands on the right, where causality hides it. So it is
one mechanism for gated delta nets, Mamba 1 and 2, short convolutions, RG-LRU, lightning attention, xLSTM and RWKV.

Which modules they are is found by what every mixer needs in order to generate: its forward takes a cache or a state.
Attention that goes through transformers' interface takes one too, and asks for our attention instead. Of a model whose
attention is code of its own (ALiBi of Bloom and MPT, Falcon, GPT-J) the whole decoder is such a mixer. Kernels that
take `cu_seq_lens` or `seq_idx` (flash-linear-attention, mamba-ssm) are not handed any: a bucket is a batch to them.
Where mamba-ssm is installed, a mixer of transformers trains by a kernel that takes the weights of its projections, past
their adapters and as if they were not in 4 bits; here it takes the way that calls them. None of this was measured on a
card.
"""

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from qtune.memory.documents import (
    Buckets,
    bucket_documents,
    documents_are,
    documents_here,
    into_buckets,
    out_of_buckets,
)

# what the classes of transformers call what they carry from one token to the next
CACHES = {"cache_params", "past_key_values", "past_key_value", "layer_past", "state", "use_cache"}
INTERFACE = "ALL_ATTENTION_FUNCTIONS"  # the name under which they look attention up
# how code asks its attention for a bias by position (Inkling), makes a mask by what the values are (Doge), chooses the
# keys that are seen by a smaller attention (DeepSeek-V3.2, GLM-5), or sees several tokens as one key (DeepSeek-V4)
UNKNOWN = ("position_bias=position_bias", "def prepare_dynamic_mask(", "self.indexer = ", "self.compressor = ")
SHORTCUT = "if self.training and cache_params is None:"
Forward = Callable[..., Any]


def install(model: PreTrainedModel) -> None:
    """Let the token mixers of `model` run over each document of a packed row by itself; its whole decoder where the
    attention, too, is code of its own."""
    for mixer in [model.base_model] if runs_as_a_whole(type(model)) else list(token_mixers(model)):
        mixer.forward = types.MethodType(_by_document(mixer), mixer)


def runs_as_a_whole(kind: Any) -> bool:
    """Whether the attention of a model class does not ask transformers' interface, or asks for what ours has not."""
    code = _source_of(inspect.getmodule(kind) or kind)
    return not kind._can_set_attn_implementation() or any(each in code for each in UNKNOWN)


def _source_of(code: Any) -> str:
    try:
        return inspect.getsource(code)
    except (OSError, TypeError):  # there is none to read
        return ""


def token_mixers(model: PreTrainedModel) -> Iterator[Any]:
    """The innermost modules within layers that carry a state from token to token and do not ask the interface."""
    lists = [part for part in model.modules() if isinstance(part, torch.nn.ModuleList)]
    carriers = {part for layers in lists for layer in layers for part in layer.modules() if _takes_cache(part)}
    carriers -= {layer for layers in lists for layer in layers}
    for part in (each for each in model.modules() if each in carriers):
        has_inner = any(inner in carriers for inner in part.modules() if inner is not part)
        if not has_inner and not _asks_interface(part):
            yield part


def _takes_cache(module: torch.nn.Module) -> bool:
    return not CACHES.isdisjoint(inspect.signature(type(module).forward).parameters)


def _asks_interface(module: torch.nn.Module) -> bool:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and INTERFACE in code.co_names


def _by_document(mixer: torch.nn.Module) -> Forward:
    original = _calling_projections(mixer)

    @functools.wraps(original)
    def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = kwargs.pop("document_lengths", None)  # which kernels would be handed, and do not know
        lengths = documents_here() if given is None else tuple(given)
        if lengths is None or len(lengths) == 1 or not _can_be_cut((args, kwargs), sum(lengths)):
            return original(*args, **kwargs)
        device = next(each.device for each in _tensors((args, kwargs)))
        buckets = bucket_documents(lengths, device)
        calls = _cut((args, kwargs), sum(lengths), buckets)
        with documents_are(None):
            outputs = [original(*arguments, **named) for arguments, named in calls]
        return _joined(outputs, buckets)

    return forward


def _calling_projections(mixer: torch.nn.Module) -> Forward:
    """The forward of `mixer`, by its short cut for training in no case; what drops out are modules of their own."""
    original: Forward = mixer.forward
    if SHORTCUT not in _source_of(inspect.unwrap(type(mixer).forward)):
        return original

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        was_training, mixer.training = mixer.training, False
        try:
            return original(*args, **kwargs)
        finally:
            mixer.training = was_training

    return forward


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _tensors(each)


def _is_by_token(tensor: torch.Tensor, tokens: int) -> bool:
    return tensor.shape[:2] == (1, tokens)


def _can_be_cut(arguments: Any, tokens: int) -> bool:
    """Whether every tensor has one row for each of the T tokens, as a mask of (1, 1, T, T) has not."""
    tensors = [tensor for tensor in _tensors(arguments) if tensor.ndim > 1]
    return bool(tensors) and all(_is_by_token(tensor, tokens) for tensor in tensors)


def _cut(value: Any, tokens: int, buckets: Buckets) -> list[Any]:
    """`value` once for each bucket, every tensor of (1, T, ...) in it as a (D, S, ...)."""
    if isinstance(value, torch.Tensor) and _is_by_token(value, tokens):
        return list(into_buckets(value.squeeze(0), buckets))
    if type(value) is dict:
        columns = [_cut(each, tokens, buckets) for each in value.values()]
        return [dict(zip(value, row, strict=True)) for row in _rows(columns, buckets)]
    if type(value) in (tuple, list):
        return [type(value)(row) for row in _rows([_cut(each, tokens, buckets) for each in value], buckets)]
    return [value] * len(buckets.shapes)


def _rows(columns: list[list[Any]], buckets: Buckets) -> list[list[Any]]:
    return [[column[i] for column in columns] for i in range(len(buckets.shapes))]


def _joined(outputs: list[Any], buckets: Buckets) -> Any:
    """The outputs of all buckets as one of (1, T, ...). What has no tokens, such as a state, is that of no document."""
    first = outputs[0]
    if isinstance(first, torch.Tensor):
        if all(each.shape[:2] == shape for each, shape in zip(outputs, buckets.shapes, strict=True)):
            return out_of_buckets(buckets, outputs).unsqueeze(0)
        return None
    if type(first) in (tuple, list):
        return type(first)(_joined(list(column), buckets) for column in zip(*outputs, strict=True))
    if isinstance(first, ModelOutput):
        return type(first)(**{name: _joined([each[name] for each in outputs], buckets) for name in first})
    return None
