"""A frozen linear and its LoRA pair as one operation.

Held less of: peft's copies of the output (clone, product, scaled product, sum: four of (T, O)), of which one remains;
the dequantised weight is made when it is needed, forward and backward, and never kept.
Costs: nothing; fewer passes over memory.
Refuses: DoRA, adapter dropout, adapters with a bias, and more than one adapter: peft's own forward runs there. Same
output and gradients to rounding: the sum is made inside the second product.

y = x W' + b + s (x A') B', with gradients
dx = dy W + s (dy B) A,   dA = s (dy B)' x,   dB = s dy' (x A').

Letters: T tokens, I inputs, O outputs, r rank, s scale.
"""

import types
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from qtune.memory import nf4
from qtune.memory.layers import compute_dtype_here


@dataclass(frozen=True)
class Part:
    """Which rows (outputs) and columns (inputs) of the weight take part; None is all of them.

    `sink` (T, I) takes the input's gradient by addition, in place of autograd's own sums; `is_skipped` says that the
    output's value is not wanted, only what its gradient leads to.
    """

    rows: slice | None = None
    columns: slice | None = None
    sink: torch.Tensor | None = None
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
    dtype = getattr(base, "compute_dtype", None) or compute_dtype_here(x)
    low, high = layer.lora_A[name].weight, layer.lora_B[name].weight
    if part.rows is not None:
        high = high[part.rows]
    if part.columns is not None:
        low = low[:, part.columns]
    return _LoraLinear.apply(x.to(dtype), low, high, layer.scaling[name], base, part)


def _weight(base: torch.nn.Linear, part: Part, dtype: torch.dtype) -> torch.Tensor:
    weight = nf4.weight_rows(base, part.rows or slice(0, base.out_features), dtype)
    return weight if part.columns is None else weight[:, part.columns]


def _bias(base: torch.nn.Linear, part: Part, dtype: torch.dtype) -> torch.Tensor | None:
    """The bias of the outputs; of parts by columns, which are summed, the first one's only."""
    if base.bias is None or (part.columns is not None and part.columns.start > 0):
        return None
    return base.bias[part.rows or slice(None)].to(dtype)


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
        rows = x.reshape(-1, x.shape[-1])
        inner = rows @ low.to(x.dtype).t()
        ctx.save_for_backward(x, low, high, inner)
        ctx.scale, ctx.base, ctx.part = scale, base, part
        shape = (*x.shape[:-1], high.shape[0])
        if part.is_skipped:
            return x.new_zeros(1).expand(shape)
        output = torch.nn.functional.linear(rows, _weight(base, part, x.dtype), _bias(base, part, x.dtype))
        output.addmm_(inner, high.to(x.dtype).t(), alpha=scale)
        return torch.ops.aten._unsafe_view(output, shape)  # a model may not write into a view, and Gemma 3n writes

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, low, high, inner = ctx.saved_tensors
        rows, gradient = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1]).to(x.dtype)
        of_inner = (gradient @ high.to(x.dtype)).mul_(ctx.scale)
        of_low = (of_inner.t() @ rows).to(low.dtype) if ctx.needs_input_grad[1] else None
        of_high = (gradient.t() @ inner).mul_(ctx.scale).to(high.dtype) if ctx.needs_input_grad[2] else None
        of_x = None
        if ctx.part.sink is not None:
            sink = ctx.part.sink.view(rows.shape)
            sink.addmm_(gradient, _weight(ctx.base, ctx.part, x.dtype)).addmm_(of_inner, low.to(x.dtype))
        elif ctx.needs_input_grad[0]:
            of_x = gradient @ _weight(ctx.base, ctx.part, x.dtype)
            of_x = of_x.addmm_(of_inner, low.to(x.dtype)).view(x.shape)
        return of_x, of_low, of_high, None, None, None
