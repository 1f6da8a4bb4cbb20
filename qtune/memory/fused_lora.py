"""A frozen linear and its LoRA pair as one operation, and linears of the same input as one.

Held less of: peft's copies of the output (clone, product, scaled product, sum: four of (T, O)), of which one remains;
the dequantised weight is made when it is needed, forward and backward, and never kept. Of the gated product that an MLP
projects down, gate and up are kept, and the product is made again.
Costs: nothing; fewer passes over memory. Adapters are rounded to 16 bits at every use, all of an operation at once, as
copies that were kept would take half as much again as they do, and bitsandbytes changes weights without a sign of it.
Refuses: DoRA, adapter dropout, adapters with a bias, and more than one adapter: peft's own forward runs there. Same
output and gradients to rounding: the sum is made inside the second product.

An adapter's gradient is a sum over tokens, which a 16-bit product would round once: of tiles once each, and the sum
would not be that of all tokens at once. It is made in float32, so that it is the same in however many pieces.

y = x W' + b + s (x A') B', with gradients
dx = dy W + s (dy B) A,   dA = s (dy B)' x,   dB = s dy' (x A').

Queries, keys and values have the same input, and so have gate and up: their A stand below each other in one product,
forward and backward, and dx is summed up inside the products. Same as one by one to rounding.

Letters: T tokens, I inputs, O outputs, r rank (of linears that go together, of all), s scale.
"""

import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from qtune import accelerator
from qtune.memory import layer_ops, memory_tracker, nf4
from qtune.memory.gradient_checkpointing import compute_dtype_here
from qtune.memory.layer_ops import GatedProduct

SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # called one after another, in this order
LONG_ROWS = 512  # in evaluation; twice as many as bitsandbytes multiplies a large weight with in 4 bits, on any card
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


def fuse(model: torch.nn.Module) -> list["Siblings"]:
    """Run every linear of `model` that has a plain adapter as one operation, those of the same input together.

    In training, and in evaluation where there are so many rows that bitsandbytes writes the dequantised weight out.
    Returns the linears as they go together.
    """
    every = [siblings for module in model.modules() for siblings in _siblings_in(module)]
    for siblings in every:
        for index in range(len(siblings.layers)):
            _install(siblings, index)
    return every


def _siblings_in(parent: torch.nn.Module) -> list["Siblings"]:
    """The children that are fused, as they go together; none in attention that reads the keys of another."""
    fused = {name: child for name, child in parent.named_children() if why_not_fused(child) is None}
    together: list[list[Any]] = []
    for names in SAME_INPUT:
        if set(names) <= fused.keys() and not getattr(parent, "is_kv_shared_layer", False):
            together.append([fused.pop(name) for name in names])
    return [Siblings(tuple(layers)) for layers in (*together, *([layer] for layer in fused.values()))]


class Siblings:
    """Linears that are called one after another with the same input: the first call computes all.

    What the others will ask for waits here. Should one be called with another input, they go apart for good.
    """

    def __init__(self, layers: tuple[LoraLayer, ...]):
        self.layers, self.is_apart = layers, False
        self._input: torch.Tensor | None = None
        self._waiting: dict[int, torch.Tensor] = {}

    def output(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """What the linear number `index` makes of x (..., I)."""
        if index and self._waiting:
            if x is self._input and index in self._waiting:
                return self._take(index)
            self.is_apart = True
        self.forget()
        if self.is_apart or index or len(self.layers) == 1:
            return lora_linear(self.layers[index], x)
        first, *others = lora_linears(self.layers, x)
        self._input, self._waiting = x, dict(enumerate(others, start=1))
        return first

    def _take(self, index: int) -> torch.Tensor:
        output = self._waiting.pop(index)
        if not self._waiting:
            self._input = None
        return output

    def forget(self) -> None:
        """Drop what nobody came for, after a pass that did not come to its end."""
        self._input = None
        self._waiting.clear()


def _install(siblings: Siblings, index: int) -> None:
    layer = siblings.layers[index]
    whole = layer.forward

    def forward(self: LoraLayer, x: torch.Tensor | GatedProduct, *args: Any, **kwargs: Any) -> torch.Tensor:
        rows = x.gate if isinstance(x, GatedProduct) else x
        is_long = rows.numel() > LONG_ROWS * rows.shape[-1]
        if self.disable_adapters or self.merged or args or kwargs or not (self.training or is_long):
            return whole(x.value() if isinstance(x, GatedProduct) else x, *args, **kwargs)
        return _gated_linear(self, x) if isinstance(x, GatedProduct) else siblings.output(index, x)

    forward.takes_product = True  # type: ignore[attr-defined]
    layer.forward = types.MethodType(forward, layer)


def lora_linear(layer: LoraLayer, x: torch.Tensor, part: Part = WHOLE) -> torch.Tensor:
    """The adapted linear of x (..., I), or the part of it that `part` names."""
    name = layer.active_adapters[0]
    low, high = layer.lora_A[name].weight, layer.lora_B[name].weight
    if part.rows is not None:
        high = high[part.rows]
    if part.columns is not None:
        low, high = low[:, part.columns], high if part.columns.start == 0 else high.detach()
    (output,) = _LoraLinears.apply(x.to(_dtype_of(layer, x)), _Linears.of((layer,), part), low, high)
    return output


def lora_linears(layers: tuple[LoraLayer, ...], x: torch.Tensor, is_skipped: bool = False) -> tuple[torch.Tensor, ...]:
    """The adapted linears of x (..., I), one output each; of what `is_skipped` only what leads to the gradients."""
    linears = _Linears.of(layers, Part(is_skipped=is_skipped))
    outputs: tuple[torch.Tensor, ...] = _LoraLinears.apply(x.to(_dtype_of(layers[0], x)), linears, *_factors(layers))
    return outputs


def _gated_linear(layer: LoraLayer, product: GatedProduct) -> torch.Tensor:
    """The adapted linear of a gated product, which is not kept."""
    gate, up = (tensor.to(_dtype_of(layer, tensor)) for tensor in (product.gate, product.up))
    output: torch.Tensor = _LoraOfProduct.apply(
        gate, up, product.activation, _Linears.of((layer,)), *_factors((layer,))
    )
    return output


def _factors(layers: tuple[LoraLayer, ...]) -> list[torch.Tensor]:
    """A and B of each."""
    return [pair[layer.active_adapters[0]].weight for layer in layers for pair in (layer.lora_A, layer.lora_B)]


def inner_of(layer: LoraLayer, x: torch.Tensor) -> torch.Tensor:
    """x A' (T, r) of x (..., I)."""
    return _inner(x.to(_dtype_of(layer, x)), layer.lora_A[layer.active_adapters[0]].weight)


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


@dataclass(frozen=True)
class _Rounded:
    """The factors of an operation in its dtype: `low` (r, I) has every A below the one before, `highs` are B (O, r)."""

    low: torch.Tensor
    highs: list[torch.Tensor]

    @classmethod
    def to(cls, dtype: torch.dtype, factors: Sequence[torch.Tensor]) -> "_Rounded":
        lows, highs = list(factors[::2]), list(factors[1::2])
        if lows[0].dtype == dtype:
            return cls(lows[0] if len(lows) == 1 else torch.cat(lows), highs)
        flat = lows[0].new_empty(sum(factor.numel() for factor in factors), dtype=dtype)
        every = [*lows, *highs]
        copies = flat.split([factor.numel() for factor in every])
        copies = [copy.view(factor.shape) for copy, factor in zip(copies, every, strict=True)]
        torch._foreach_copy_(copies, every)
        low = flat[: sum(low.numel() for low in lows)].view(-1, lows[0].shape[1])
        return cls(low, copies[len(lows) :])


@dataclass(frozen=True)
class _Linears:
    """The frozen part of adapted linears that have the same input (T, I); the adapters' is given each time."""

    bases: tuple[torch.nn.Linear, ...]
    scales: tuple[float, ...]
    ranks: tuple[int, ...]
    part: Part = WHOLE

    @classmethod
    def of(cls, layers: tuple[LoraLayer, ...], part: Part = WHOLE) -> "_Linears":
        names = [layer.active_adapters[0] for layer in layers]
        return cls(
            tuple(layer.get_base_layer() for layer in layers),
            tuple(layer.scaling[name] for layer, name in zip(layers, names, strict=True)),
            tuple(layer.lora_A[name].weight.shape[0] for layer, name in zip(layers, names, strict=True)),
            part,
        )

    def outputs(self, x: torch.Tensor, inner: torch.Tensor, rounded: _Rounded) -> list[torch.Tensor]:
        """Each (T, O) of x and of `inner` = x A' (T, r)."""
        outputs = []
        parts = zip(self.bases, self.scales, inner.split(self.ranks, dim=1), rounded.highs, strict=True)
        for base, scale, own, high in parts:
            bias = None if base.bias is None else base.bias[self.part.rows or slice(None)].to(x.dtype)
            output = torch.nn.functional.linear(x, _weight(base, self.part, x.dtype), bias)
            outputs.append(output.addmm_(own, high.t(), alpha=scale))
        return outputs

    def of_inner(self, gradients: Sequence[torch.Tensor], rounded: _Rounded) -> torch.Tensor:
        """s dy B of each beside the others (T, r)."""
        whole = gradients[0].new_empty(len(gradients[0]), sum(self.ranks))
        parts = zip(whole.split(self.ranks, dim=1), gradients, rounded.highs, self.scales, strict=True)
        for own, gradient, high, scale in parts:
            own.addmm_(gradient, high, beta=0, alpha=scale)
        return whole

    def of_input(self, gradients: Sequence[torch.Tensor], of_inner: torch.Tensor, rounded: _Rounded) -> torch.Tensor:
        """dx (T, I), one dequantised weight at a time."""
        total = gradients[0] @ _weight(self.bases[0], self.part, of_inner.dtype)
        for gradient, base in zip(gradients[1:], self.bases[1:], strict=True):
            total.addmm_(gradient, _weight(base, self.part, of_inner.dtype))
        return total.addmm_(of_inner, rounded.low)

    def of_factors(
        self, x: torch.Tensor, inner: torch.Tensor, gradients: Sequence[torch.Tensor], of_inner: torch.Tensor
    ) -> list[torch.Tensor]:
        """dA and dB of each."""
        of_lows = _sum_over_tokens(of_inner, x).split(self.ranks)
        parts = zip(of_lows, gradients, inner.split(self.ranks, dim=1), self.scales, strict=True)
        return [
            gradient
            for of_low, of_output, own, scale in parts
            for gradient in (of_low, _sum_over_tokens(of_output, own).mul_(scale))
        ]


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _shaped(output: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Rows (T, O) as `like` has them: no view, as a model may write into an output, and Gemma 3n writes."""
    return torch.ops.aten._unsafe_view(output, (*like.shape[:-1], output.shape[-1]))


class _LoraLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, linears: _Linears, *factors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        part, rounded = linears.part, _Rounded.to(x.dtype, factors)
        inner = _flat(x) @ rounded.low.t() if part.inner is None else part.inner
        ctx.save_for_backward(x, inner, *factors)
        ctx.linears = linears
        if part.is_skipped:
            return tuple(x.new_zeros(1).expand(*x.shape[:-1], len(high)) for high in factors[1::2])
        return tuple(_shaped(output, x) for output in linears.outputs(_flat(x), inner, rounded))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        x, inner, *factors = ctx.saved_tensors
        linears, rows, rounded = ctx.linears, _flat(x), _Rounded.to(x.dtype, factors)
        of_outputs = [_flat(gradient).to(x.dtype) for gradient in gradients]
        of_inner = linears.of_inner(of_outputs, rounded)
        of_factors = linears.of_factors(rows, inner, of_outputs, of_inner)
        of_x = linears.of_input(of_outputs, of_inner, rounded).view(x.shape) if ctx.needs_input_grad[0] else None
        return of_x, None, *_as_wanted(of_factors, factors, ctx.needs_input_grad[2:])


class _LoraOfProduct(torch.autograd.Function):
    """An adapted linear of activation(gate) * up, which are kept in its stead."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: torch.Tensor,
        up: torch.Tensor,
        activation: layer_ops.Activation,
        linears: _Linears,
        *factors: torch.Tensor,
    ) -> torch.Tensor:
        x, rounded = _flat(layer_ops.gated_value(gate, up, activation)), _Rounded.to(gate.dtype, factors)
        inner = x @ rounded.low.t()
        ctx.save_for_backward(gate, up, inner, *factors)
        ctx.activation, ctx.linears = activation, linears
        (output,) = linears.outputs(x, inner, rounded)
        return _shaped(output, gate)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        gate, up, inner, *factors = ctx.saved_tensors
        linears, rounded, of_output = ctx.linears, _Rounded.to(gate.dtype, factors), [_flat(gradient).to(gate.dtype)]
        of_inner = linears.of_inner(of_output, rounded)
        of_x = linears.of_input(of_output, of_inner, rounded).view(gate.shape)
        of_gate, of_up, x = layer_ops.gated_gradients(of_x, gate, up, ctx.activation)
        del of_x
        of_factors = linears.of_factors(_flat(x), inner, of_output, of_inner)
        return of_gate, of_up, None, None, *_as_wanted(of_factors, factors, ctx.needs_input_grad[4:])


def _as_wanted(
    gradients: Sequence[torch.Tensor], factors: Sequence[torch.Tensor], needs: Sequence[bool]
) -> list[torch.Tensor | None]:
    """Each in the dtype of its factor; None for one that is not trained."""
    every = zip(gradients, factors, needs, strict=True)
    return [gradient.to(factor.dtype) if needed else None for gradient, factor, needed in every]
