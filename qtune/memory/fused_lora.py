"""A frozen linear and its LoRA pair as one operation.

Held less of: peft's copies of the output (clone, product, scaled product, sum: four of (T, O)), of which one remains;
the dequantised weight is made when it is needed, forward and backward, and never kept.
Costs: nothing; fewer passes over memory.
Refuses: DoRA, adapter dropout, adapters with a bias, and more than one adapter: peft's own forward runs there. Same
output and gradients to rounding: the sum is made inside the second product.

An adapter's gradient is a sum over tokens, which a 16-bit product would round once: of tiles once each, and the sum
would not be that of all tokens at once. It is made in float32, so that it is the same in however many pieces.

y = x W' + b + s (x A') B', with gradients
dx = dy W + s (dy B) A,   dA = s (dy B)' x,   dB = s dy' (x A').

Letters: T tokens, I inputs, O outputs, r rank, s scale.
"""

import types
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from qtune import accelerator
from qtune.memory import memory_tracker, nf4
from qtune.memory.gradient_checkpointing import compute_dtype_here

PIECE_TOKENS = 256  # of a sum in float32 on the processor, which has no such product of 16-bit factors


@dataclass(frozen=True)
class Part:
    """Which rows (outputs) of the weight take part, or for the gradients only, which columns (inputs); None is all.

    `is_skipped` says that the output's value is not wanted, only what its gradient leads to. Columns are always
    skipped, and come with x A' of all columns as `inner` (T, r), of which B's gradient is made with the first ones.
    """

    rows: slice | None = None
    columns: slice | None = None
    inner: torch.Tensor | None = None
    is_skipped: bool = False


WHOLE = Part()


def why_not_fused(layer: torch.nn.Module) -> str | None:
    """Why peft's own forward is needed for this linear; None where ours can stand in."""
    if not isinstance(layer, LoraLayer) or len(layer.active_adapters) != 1:
        return "it has no adapter, or several"
    name = layer.active_adapters[0]
    if name not in layer.lora_A or layer.lora_variant:
        return "its adapter is not plain LoRA"
    if isinstance(layer.lora_dropout[name], torch.nn.Dropout) and layer.lora_dropout[name].p > 0:
        return "its adapter drops out inputs"
    if layer.lora_B[name].bias is not None:
        return "its adapter has a bias"
    return None if isinstance(layer.get_base_layer(), torch.nn.Linear) else "it is not a linear layer"


def fuse(model: torch.nn.Module) -> int:
    """Run every linear of `model` that has a plain adapter as one operation while it trains; returns how many."""
    layers = [module for module in model.modules() if why_not_fused(module) is None]
    for layer in layers:
        _install(layer)
    return len(layers)


def _install(layer: LoraLayer) -> None:
    whole = layer.forward

    def forward(self: LoraLayer, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not self.training or self.disable_adapters or self.merged or args or kwargs:
            return whole(x, *args, **kwargs)
        return lora_linear(self, x)

    layer.forward = types.MethodType(forward, layer)


def lora_linear(layer: LoraLayer, x: torch.Tensor, part: Part = WHOLE) -> torch.Tensor:
    """The adapted linear of x (..., I), or the part of it that `part` names."""
    name, base = layer.active_adapters[0], layer.get_base_layer()
    low, high = layer.lora_A[name].weight, layer.lora_B[name].weight
    if part.rows is not None:
        high = high[part.rows]
    if part.columns is not None:
        low, high = low[:, part.columns], high if part.columns.start == 0 else high.detach()
    return _LoraLinear.apply(x.to(_dtype_of(layer, x)), low, high, layer.scaling[name], base, part)


def inner_of(layer: LoraLayer, x: torch.Tensor) -> torch.Tensor:
    """x A' (T, r) of x (..., I)."""
    return _inner(x.to(_dtype_of(layer, x)), layer.lora_A[layer.active_adapters[0]].weight)


def add_input_gradient(layer: LoraLayer, gradient: torch.Tensor, total: torch.Tensor, tokens: int) -> None:
    """Add to `total` (1, T, I) the input's gradient, of the output's `gradient` (1, T, O), `tokens` at a time.

    Rounded as the whole would be, which need not be held beside `total`.
    """
    name, base = layer.active_adapters[0], layer.get_base_layer()
    low, high = (pair[name].weight.to(gradient.dtype) for pair in (layer.lora_A, layer.lora_B))
    weight = _weight(base, WHOLE, gradient.dtype)
    for tile in memory_tracker.tiles(gradient.shape[1], tokens, gradient):
        piece = gradient[0, tile]
        of_inner = (piece @ high).mul_(layer.scaling[name])
        total[0, tile] += (piece @ weight).addmm_(of_inner, low)


def _dtype_of(layer: LoraLayer, x: torch.Tensor) -> torch.dtype:
    return getattr(layer.get_base_layer(), "compute_dtype", None) or compute_dtype_here(x)


def _inner(x: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1]) @ low.to(x.dtype).t()


def _weight(base: torch.nn.Linear, part: Part, dtype: torch.dtype) -> torch.Tensor:
    weight = nf4.weight_rows(base, part.rows or slice(0, base.out_features), dtype)
    return weight if part.columns is None else weight[:, part.columns]


def _sum_over_tokens(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left' right of (T, M) and (T, N), made in float32 where they have 16 bits."""
    if left.dtype.itemsize > 2:
        return left.t() @ right
    if accelerator.is_card(left.device) or memory_tracker.stands_for_card():
        return torch.mm(left.t(), right, out_dtype=torch.float32)
    total = left.new_zeros(left.shape[1], right.shape[1], dtype=torch.float32)
    for piece in memory_tracker.tiles(len(left), PIECE_TOKENS, left):
        total += left[piece].t().float() @ right[piece].float()  # not addmm_: tiles of as many add the very same
    return total


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        low: torch.Tensor,
        high: torch.Tensor,
        scale: float,
        base: torch.nn.Linear,
        part: Part,
    ) -> torch.Tensor:
        inner = _inner(x, low) if part.inner is None else part.inner
        ctx.save_for_backward(x, low, high, inner)
        ctx.scale, ctx.base, ctx.part = scale, base, part
        shape = (*x.shape[:-1], high.shape[0])
        if part.is_skipped:
            return x.new_zeros(1).expand(shape)
        bias = None if base.bias is None else base.bias[part.rows or slice(None)].to(x.dtype)
        output = torch.nn.functional.linear(x.reshape(-1, x.shape[-1]), _weight(base, part, x.dtype), bias)
        output.addmm_(inner, high.to(x.dtype).t(), alpha=scale)
        return torch.ops.aten._unsafe_view(output, shape)  # a model may not write into a view, and Gemma 3n writes

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, low, high, inner = ctx.saved_tensors
        rows, gradient = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1]).to(x.dtype)
        of_inner = (gradient @ high.to(x.dtype)).mul_(ctx.scale)
        of_low = _sum_over_tokens(of_inner, rows).to(low.dtype) if ctx.needs_input_grad[1] else None
        of_high = None
        if ctx.needs_input_grad[2]:
            of_high = _sum_over_tokens(gradient, inner).mul_(ctx.scale).to(high.dtype)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = gradient @ _weight(ctx.base, ctx.part, x.dtype)
            of_x = of_x.addmm_(of_inner, low.to(x.dtype)).view(x.shape)
        return of_x, of_low, of_high, None, None, None
