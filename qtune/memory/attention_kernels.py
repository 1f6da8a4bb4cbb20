"""Which of torch's attention kernels runs on which card, and what it holds there.

torch takes the first of flash, memory-efficient and math attention that accepts a call. Math writes the scores of all
heads out, (H, S, S) in float32 and several of them at once; so what would end there for its grouped heads alone has its
keys and values repeated, which memory-efficient attention accepts. Several documents, or a window, go to `varlen_attn`
where there is one: flash attention over documents as they lie, which needs neither padding nor a mask.

A sink is a score of each head that takes weight from the keys and has no value. Both kernels of flash attention that
give the logarithm of a row's sum away, `varlen_attn` and the processor's, take it without knowing: with sum' = sum +
exp(sink) the output is theirs times sum / sum', and their backward pass, given that output and sum', makes the weights
and the gradients of queries, keys and values as they are beside a sink (`_Sunk`).

The rules are those of torch 2.11 to 2.13, ATen/native/transformers/cuda/sdp_utils.cpp (`can_use_flash_attention`,
`can_use_mem_efficient_attention`) and flash_attn/flash_api.cpp (`mha_varlen_fwd`). Not measured on a card.

Letters: D documents, S longest of them, T tokens of all, H query heads, K key/value heads, E head_dim.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn.attention import varlen
from torch.nn.functional import scaled_dot_product_attention

from qtune import accelerator
from qtune.accelerator import Capability
from qtune.memory import kept_attention, memory_tracker
from qtune.memory.tiled_attention import Scores, attend_in_tiles

Kernel = Literal["flash", "memory-efficient", "math"]
IN_16_BITS = (torch.float16, torch.bfloat16)
BLOCK_ROWS = 128  # of queries, which the backward pass of flash attention adds up at once (flash_api.cpp)
# Short documents hold more in such blocks than padded to powers of two: of 64 tokens each, three rows a token. Of a few
# documents that is little, 17 MB for 8 of them and 32 heads of 128.
LEAST_MEAN_TOKENS, FEW_DOCUMENTS = BLOCK_ROWS // 2, 8


@dataclass(frozen=True)
class Call:
    """One call of attention, as far as it decides which kernels accept it."""

    dtype: torch.dtype
    heads: int
    key_heads: int
    width: int
    value_width: int
    has_band: bool = False
    dropout: float = 0.0
    has_sinks: bool = False

    @classmethod
    def of(
        cls, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float, has_band: bool = False
    ) -> "Call":
        """Of (D, H, S, E) queries over (D, K, S, E) keys and values; where autocast is on, in its dtype."""
        kind = query.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
        return cls(dtype, query.shape[1], key.shape[1], query.shape[-1], value.shape[-1], has_band, dropout)

    @property
    def is_grouped(self) -> bool:
        return self.heads != self.key_heads

    @property
    def repeated(self) -> "Call":
        """The same with a key/value head for every query head."""
        return replace(self, key_heads=self.heads)


Refused = dict[str, Callable[[Call, Capability], bool]]
FLASH_REFUSES: Refused = {
    "cards before 8.0": lambda call, card: card < (8, 0),
    "other numbers than those of 16 bits": lambda call, card: call.dtype not in IN_16_BITS,
    "a mask": lambda call, card: call.has_band,
    "heads wider than 256, or values of another width than keys": lambda call, card: (
        call.width > 256 or call.width != call.value_width
    ),
    "training heads of 193 to 224, or of more with dropout, on 8.6 to 8.9 and 12": lambda call, card: (
        call.width > 192 and (call.width <= 224 or call.dropout > 0) and ((8, 6) <= card <= (8, 9) or card >= (12, 0))
    ),
}
MEMORY_EFFICIENT_REFUSES: Refused = {
    "other numbers than those of 16 and 32 bits": lambda call, card: call.dtype not in (*IN_16_BITS, torch.float32),
    "grouped heads": lambda call, card: call.is_grouped,  # taken from pytorch#191085 on, after 2.13
    "bfloat16 before 8.0": lambda call, card: call.dtype == torch.bfloat16 and card < (8, 0),
    "heads that are no multiple of 16 bytes": lambda call, card: any(
        width * call.dtype.itemsize % 16 for width in (call.width, call.value_width)
    ),
}
VARLEN_REFUSES: Refused = {
    **FLASH_REFUSES,
    "dropout": lambda call, card: call.dropout > 0,
    "heads that are no multiple of 8": lambda call, card: call.width % 8 > 0,
}


def why_refused(rules: Refused, call: Call, card: Capability) -> str | None:
    """What of `call` a kernel with these rules does not take on `card`; None where it takes it."""
    return next((what for what, is_refused in rules.items() if is_refused(call, card)), None)


def kernel_of(call: Call, card: Capability) -> Kernel:
    """The kernel that torch takes, cuDNN's left out."""
    if why_refused(FLASH_REFUSES, call, card) is None:
        return "flash"
    return "math" if why_refused(MEMORY_EFFICIENT_REFUSES, call, card) else "memory-efficient"


def needs_repeated_heads(call: Call, card: Capability | None) -> bool:
    """Whether a card takes math attention for nothing but the grouped heads of `call`."""
    return card is not None and kernel_of(call, card) == "math" and kernel_of(call.repeated, card) != "math"


def repeat_heads(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """(D, K, S, E) keys or values, each head as often as makes `heads` of them."""
    documents, groups, length, width = tensor.shape
    return tensor[:, :, None].expand(documents, groups, heads // groups, length, width).flatten(1, 2)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    band: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    """Causal attention (or within `band`) of (D, H, S, E) queries over (D, K, S, E) keys and values."""
    call, card = Call.of(query, key, value, dropout, has_band=band is not None), memory_tracker.capability_for(query)
    if needs_repeated_heads(call, card):
        call, key, value = call.repeated, repeat_heads(key, call.heads), repeat_heads(value, call.heads)
    if card is not None and memory_tracker.stands_for_card():
        return _on_card(query, key, value, band, call, kernel_of(call, card))
    return scaled_dot_product_attention(
        query, key, value, band, dropout, is_causal=band is None, scale=scaling, enable_gqa=call.is_grouped
    )


def _on_card(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    band: torch.Tensor | None,
    call: Call,
    kernel: Kernel,
) -> torch.Tensor:
    """What a card holds of a call, for a forecast: no value is computed."""
    query, key, value = (tensor.to(call.dtype) for tensor in (query, key, value))
    if kernel == "math":
        output: torch.Tensor = torch.ops.aten._scaled_dot_product_attention_math(
            query, key, value, band, call.dropout, band is None, enable_gqa=call.is_grouped
        )[0]
        return output
    if kernel == "memory-efficient":
        return _MemoryEfficient.apply(query, key, value, band)
    return _Flash.apply(query, key, value, len(query) * _in_whole(query.shape[2], BLOCK_ROWS))


class _Flash(torch.autograd.Function):
    """What flash attention holds on a card.

    Its backward pass takes a float32 copy of the queries' gradient and a sum for each query, both for whole `blocks` of
    rows, and for grouped heads gradients of keys and values for every query head (flash_api.cpp, `mha_bwd` and
    `mha_varlen_bwd`).
    """

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, blocks: int) -> torch.Tensor:
        documents, heads, length, width = query.shape

        def run() -> tuple[torch.Tensor, torch.Tensor]:
            output = query.new_empty(documents, length, heads, width).transpose(1, 2)
            return output, query.new_empty(documents, heads, length, dtype=torch.float32)

        output, sums = kept_attention.once("flash", run)
        ctx.save_for_backward(query, key, value, output, sums)
        ctx.blocks = blocks
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        heads, width = query.shape[1], query.shape[-1]
        results = _gradients(query, key, value)
        workspace = 4 * heads * ctx.blocks * (1 + _in_whole(width, 32 if width <= 128 else 64))
        if heads != key.shape[1]:
            workspace += 2 * query.nbytes
        memory_tracker.note_workspace("layer workspace", workspace)
        return *results, None


class _MemoryEfficient(torch.autograd.Function):
    """What memory-efficient attention holds on a card.

    A band becomes a bias of the queries' dtype, whose rows are multiples of 8 (attention.cpp, `preprocess_mask`). An
    output wider than 128 is summed up in float32 beside it; backward, so are the queries' gradient, in blocks of 64
    rows, and for heads wider than 64 some blocks of keys and values (kernel_backward.h, `workspace_size`).
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, band: torch.Tensor | None
    ) -> torch.Tensor:
        documents, heads, length, _ = query.shape
        bias = None if band is None else band.to(query.dtype)
        if bias is not None and length % 8:
            bias = bias.new_empty(length, _in_whole(length, 8))

        def run() -> tuple[torch.Tensor, torch.Tensor]:
            output = query.new_empty(documents, length, heads, value.shape[-1]).transpose(1, 2)
            sums = query.new_empty(documents, heads, _in_whole(length, 32), dtype=torch.float32)
            if value.shape[-1] > 128:
                memory_tracker.note_workspace("layer workspace", 4 * output.numel())
            return output, sums

        output, sums = kept_attention.once("memory-efficient", run)
        ctx.save_for_backward(query, key, value, output, sums, bias)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        documents, heads, length, width = query.shape
        results = _gradients(query, key, value)
        floats = length + _in_whole(length, 64) * _in_whole(width, 64)  # of one head: a sum each, queries
        if query.dtype not in IN_16_BITS:
            floats += length * value.shape[-1]  # that sum's products
        elif width > 64:
            blocks = max(1, 200 // (documents * heads))  # attention_backward.cu, "Keys splitting heuristic"
            floats += min(_in_whole(length, 128), 128 * blocks) * (width + value.shape[-1])
        memory_tracker.note_workspace("layer workspace", 4 * documents * heads * floats)
        return *results, None


def _gradients(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Of (D, H, S, E) tensors, laid out as these kernels do: (D, S, H, E)."""
    return tuple(tensor.new_empty(tensor.transpose(1, 2).shape).transpose(1, 2) for tensor in tensors)


def _in_whole(length: int, block: int) -> int:
    """`length` in whole blocks."""
    return -(-length // block) * block


def has_varlen() -> bool:
    """Whether torch's `varlen_attn` takes windows and grouped heads: that of 2.10 takes neither, that of 2.12 both."""
    return _takes_windows_and_groups(varlen.varlen_attn)


@functools.cache
def _takes_windows_and_groups(attention: Callable[..., Any]) -> bool:
    return {"window_size", "enable_gqa"} <= set(inspect.signature(attention).parameters)


def suits_varlen(call: Call, lengths: Sequence[int], window: int | None, card: Capability | None) -> bool:
    """Whether documents of these lengths go to `varlen_attn`: not one alone that sees itself whole, which plain flash
    attention takes as well, nor many short ones. With sinks all do that can."""
    if card is None or not has_varlen() or why_refused(VARLEN_REFUSES, call, card):
        return False
    if call.has_sinks:
        return True
    is_plain = len(lengths) == 1 and (window is None or window >= lengths[0])
    are_many_and_short = len(lengths) > FEW_DOCUMENTS and sum(lengths) < LEAST_MEAN_TOKENS * len(lengths)
    return not is_plain and not are_many_and_short


@dataclass(frozen=True)
class Spans:
    """What `varlen_attn` is told of a pack: where its documents begin and end, (D + 1,) int32; how long the longest is;
    and how many tokens before and after itself a token sees, -1 for all."""

    bounds: torch.Tensor
    longest: int
    window: tuple[int, int]


@functools.lru_cache(maxsize=8)
def spans_of(lengths: tuple[int, ...], window: int | None, device: torch.device) -> Spans:
    """For causal attention within documents of these lengths, each token within a window that counts it, too.

    Kept between calls, as every layer asks for the same pack.
    """
    longest = max(lengths)
    with unset_fake_temporarily(), torch.inference_mode(False):  # a training pass may keep it
        bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    return Spans(bounds, longest, (-1 if window is None or window >= longest else window - 1, 0))


def attend_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: Spans,
    scaling: float | None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """(1, H, T, E), causal within each document, of (1, H, T, E) queries over (1, K, T, E) keys and values, all of them
    in 16 bits; `sinks` are (H,)."""
    if memory_tracker.stands_for_card():
        flash = _Flash.apply(query, key, value, query.shape[2] + BLOCK_ROWS * (len(spans.bounds) - 1))
        if sinks is not None:
            memory_tracker.note_workspace("layer workspace", flash.nbytes)  # the output as the kernel makes it
        return flash
    q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))  # (T, H or K, E)
    if sinks is not None:
        output: Any = _Sunk.apply(q, k, v, sinks, _SpannedFlash(spans, scaling))
    else:
        ends, longest = spans.bounds, spans.longest
        asked: Any = {"scale": scaling, "window_size": spans.window, "enable_gqa": query.shape[1] != key.shape[1]}
        output = varlen.varlen_attn(q, k, v, ends, ends, longest, longest, **asked)
    attended: torch.Tensor = output.transpose(0, 1).unsqueeze(0)
    return attended


def attend_with_sinks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor,
    window: int | None,
    scaling: float | None,
) -> torch.Tensor:
    """Causal attention of (D, H, S, E) queries beside (H,) `sinks`: the processor's flash attention, which has one
    width, or tiles."""
    length, device, call = query.shape[2], query.device, Call.of(query, key, value, 0.0)
    if accelerator.is_card(device) or memory_tracker.stands_for_card() or call.width != call.value_width:
        how = Scores(call.width**-0.5 if scaling is None else scaling, window=window)
        return attend_in_tiles(query, key, value, sinks, how)
    key, value, bias = repeat_heads(key, call.heads), repeat_heads(value, call.heads), None
    if window is not None and window < length:
        band = causal_band(length, window, device)
        bias = torch.zeros(band.shape, dtype=call.dtype, device=device).masked_fill_(~band, -torch.inf)
    q, k, v = (tensor.to(call.dtype) for tensor in (query, key, value))
    attended: torch.Tensor = _Sunk.apply(q, k, v, sinks[:, None], _HostFlash(bias, scaling))
    return attended


@dataclass(frozen=True)
class _HostFlash:
    """The processor's flash attention, of (D, H, S, E); sums are (D, H, S)."""

    bias: torch.Tensor | None
    scaling: float | None

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        result: tuple[torch.Tensor, torch.Tensor] = run(
            q, k, v, 0.0, self.bias is None, attn_mask=self.bias, scale=self.scaling
        )
        return result

    def backward(self, gradient: torch.Tensor, *kept: torch.Tensor) -> tuple[torch.Tensor, ...]:
        run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        result: tuple[torch.Tensor, ...] = run(
            gradient, *kept, 0.0, self.bias is None, attn_mask=self.bias, scale=self.scaling
        )
        return result


@dataclass(frozen=True)
class _SpannedFlash:
    """`varlen_attn`, of (T, H, E), by the operators it is made of (torch.nn.attention.varlen); sums are (T, H)."""

    spans: Spans
    scaling: float | None

    @property
    def asked(self) -> dict[str, Any]:
        return {
            "scale": self.scaling,
            "window_size": list(self.spans.window),
            "is_causal": self.spans.window == (-1, 0),
        }

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ends, longest = self.spans.bounds, self.spans.longest
        run = torch.ops.torch_attn._varlen_attn
        is_grouped = q.shape[1] != k.shape[1]
        output, sums, _ = run(q, k, v, ends, ends, longest, longest, enable_gqa=is_grouped, **self.asked)
        return output, sums.t()

    def backward(self, gradient: torch.Tensor, *kept: torch.Tensor) -> tuple[torch.Tensor, ...]:
        *others, sums = kept
        ends, longest = self.spans.bounds, self.spans.longest
        unused = torch.zeros(2, dtype=torch.uint64, device=gradient.device)  # the state of a dropout that is off
        run = torch.ops.torch_attn._varlen_attn_backward
        result: tuple[torch.Tensor, ...] = run(
            gradient, *others, sums.t().contiguous(), ends, ends, longest, longest, rng_state=unused, **self.asked
        )
        return result


class _Sunk(torch.autograd.Function):
    """Attention of `kernel` beside sinks, which broadcast to its sums; the output lasts, not what the kernel made."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor,
        kernel: _HostFlash | _SpannedFlash,
    ) -> torch.Tensor:
        def run() -> tuple[torch.Tensor, torch.Tensor]:
            output, sums = kernel.forward(query, key, value)
            whole = torch.logaddexp(sums, sinks.to(sums.dtype))
            return output * (sums - whole).exp_().to(output.dtype)[..., None], whole

        output, whole = kept_attention.once("sunk", run)
        ctx.save_for_backward(query, key, value, output, whole, sinks)
        ctx.kernel = kernel
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *kept, whole, sinks = ctx.saved_tensors
        of_sinks = None
        if ctx.needs_input_grad[3]:
            weight = (sinks.to(whole.dtype) - whole).exp_()
            through = (gradient.to(whole.dtype) * kept[3]).sum(-1)
            of_sinks = -(weight * through).sum_to_size(sinks.shape).to(sinks.dtype)
        return *ctx.kernel.backward(gradient.contiguous(), *kept, whole), of_sinks, None


_tried_already: dict[tuple[Call, bool, torch.device], str | None] = {}
TRIED_LENGTHS, TRIED_WINDOW = (70, 150), 40  # more than a block of rows, and documents longer than the window
TRIED_TOLERANCE = 0.03  # of the largest value: 16 bits make it 0.007, and a window that is one off 0.2 and more


def varlen_fault(call: Call, is_windowed: bool, device: torch.device) -> str | None:
    """What is wrong with `varlen_attn` for calls such as this one, tried once on `device`; None where nothing is."""
    tried = (call, is_windowed, device)
    if tried not in _tried_already:
        try:
            _tried_already[tried] = _tried(call, TRIED_WINDOW if is_windowed else None, device)
        except torch.OutOfMemoryError:
            raise
        except Exception as fault:  # a kernel that is not in this build can refuse in any way
            _tried_already[tried] = " ".join(f"{type(fault).__name__}: {fault}".split())[:200]
    return _tried_already[tried]


def varlen_faults() -> list[str]:
    """What was wrong with `varlen_attn` in this process, each once."""
    return list(dict.fromkeys(why for why in _tried_already.values() if why is not None))


def _tried(call: Call, window: int | None, device: torch.device) -> str | None:
    """By how much output and gradients of two documents are off from attention in float32, if they are."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        *inputs, weights = _drawn(call, device)
        query, key, value = inputs
        sinks = torch.linspace(-1, 1, call.heads, device=device) if call.has_sinks else None
        documents: Any = zip(*(tensor.split(TRIED_LENGTHS, 2) for tensor in inputs), strict=True)
        output = attend_varlen(query, key, value, spans_of(TRIED_LENGTHS, window, device), None, sinks)
        exact = torch.cat([_by_definition(q, k, v, window, sinks) for q, k, v in documents], 2)
        found, wanted = ((x.detach(), *torch.autograd.grad((x * weights).sum(), inputs)) for x in (output, exact))
    for mine, right in zip(found, wanted, strict=True):
        error = float((mine.float() - right.float()).abs().max() / right.float().abs().max())
        if not error <= TRIED_TOLERANCE:
            return f"off by {error:.0%} of the largest value"
    return None


def _drawn(call: Call, device: torch.device) -> list[torch.Tensor]:
    """Queries, keys, values and weights of an output, without a touch on anybody's random numbers."""
    generator, tokens = torch.Generator().manual_seed(0), sum(TRIED_LENGTHS)
    heads = (call.heads, call.key_heads, call.key_heads, call.heads)
    drawn = (torch.randn(1, count, tokens, call.width, generator=generator) for count in heads)
    return [values.to(device, call.dtype).requires_grad_() for values in drawn]


def _by_definition(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None, sinks: torch.Tensor | None
) -> torch.Tensor:
    """Attention of one document as it is defined, in float32."""
    length, heads = query.shape[2], query.shape[1]
    query, key, value = query.float(), repeat_heads(key, heads).float(), repeat_heads(value, heads).float()
    scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    scores = scores.masked_fill(~causal_band(length, window or length, query.device), -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(1, heads, length, 1)], -1)
    output: torch.Tensor = scores.softmax(-1)[..., :length] @ value
    return output


def causal_band(length: int, window: int, device: torch.device) -> torch.Tensor:
    """(S, S): each token sees itself and those before it, `window` at most. Made in place, as S can be long."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril_().triu_(1 - window)
