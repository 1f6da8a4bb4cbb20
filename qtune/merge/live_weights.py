"""The weights that the live model computes with, restored by bitsandbytes and added to by peft.

Nothing of what a merge is made with has a part in them, so that they can witness to it: neither its reading of the
adapter, nor its scale, nor its way through 4 bits.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils import ModulesToSaveWrapper
from torch.linalg import vector_norm
from torch.nn.functional import embedding, linear
from transformers.pytorch_utils import Conv1D

from qtune.memory import trained_rows
from qtune.memory.engine import send_inputs_to_layers
from qtune.memory.packed_experts import block_scales, is_packed, matrices, plain_stacks
from qtune.units import MIB

WIDENED_BYTES = 256 * MIB  # of an output head in float32 at a time: that of a vocabulary of 128k is 2 GB
UNIT = 2.0**-24  # float32 rounds a sum or a product by at most this fraction
DORA_NOISE = 2.0**-18  # of a weight: its row's length is a sum of thousands of squares; 2**-21 is the most seen


def layer_called(model: PeftModel, name: str) -> torch.nn.Module | None:
    """The module that the base calls `name`, with its adapter around it; in its place one that was trained whole."""
    try:
        layer = model.get_base_model().get_submodule(name)
    except AttributeError:
        return None
    return layer.modules_to_save[layer.active_adapters[0]] if isinstance(layer, ModulesToSaveWrapper) else layer


@dataclass(frozen=True)
class LiveExperts:
    """The parameter `name` of a module with experts, in 4 bits or not, and what peft put around it, if it did."""

    experts: Any
    name: str
    wrapper: ParamWrapper | None

    @classmethod
    def called(cls, model: PeftModel, tensor: str) -> "LiveExperts | None":
        """The parameter that the base calls `tensor`; None for one that is simply there."""
        module, _, name = tensor.rpartition(".")
        inner: Any = layer_called(model, module)
        wrappers: dict[str, ParamWrapper] = {}
        while isinstance(inner, ParamWrapper):
            wrappers[inner.parameter_name] = inner
            inner = inner.base_layer
        found = cls(inner, name, wrappers.get(name))
        return found if found.wrapper is not None or is_packed(getattr(inner, name, None)) else None

    @property
    def device(self) -> torch.device:
        return next(self.wrapper.lora_A.parameters()).device if self.wrapper else self.experts.down_proj.device

    def held(self, experts: slice) -> torch.Tensor:
        """The matrices (G, N, K) of some experts without the adapter, in float32, as training saw them."""
        parameter = getattr(self.experts, self.name)
        dtype = parameter.quant_state.dtype if is_packed(parameter) else parameter.dtype
        return matrices(parameter, block_scales(parameter), experts, dtype).to(self.device).float()

    def tuned(self, start: torch.Tensor, experts: slice, rows: slice) -> torch.Tensor:
        """`start` (G, N, K), float32, which are `rows` of some experts' matrices, with the adapter."""
        if self.wrapper is None:
            return start
        b, a = self._factors(experts, start)
        return torch.baddbmm(start, b[:, rows], a, alpha=self.wrapper.scaling[_adapter(self.wrapper)])

    def noise(self, tuned: torch.Tensor, experts: slice, rows: slice) -> torch.Tensor | None:
        """As `noise` of a linear has it, for what `tuned` gave."""
        if self.wrapper is None:
            return None
        b, a = self._factors(experts, tuned)
        sizes = vector_norm(b[:, rows], dim=2)[:, :, None] * vector_norm(a, dim=1)[:, None]
        scale = 2 * (a.shape[1] + 2) * UNIT * abs(self.wrapper.scaling[_adapter(self.wrapper)])
        return sizes.mul_(scale).add_(tuned.abs(), alpha=4 * UNIT)

    def _factors(self, experts: slice, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(G, N, R) and (G, R, K) whose product is the update, as peft reads its two matrices."""
        assert self.wrapper is not None
        name, count = _adapter(self.wrapper), self.wrapper.num_experts
        a, b = (part[name].weight.float().to(like.device) for part in (self.wrapper.lora_A, self.wrapper.lora_B))
        a = a.reshape(count, -1, a.shape[1])[experts]
        b = b.reshape(len(b), -1, count)[:, :, experts].permute(2, 0, 1)
        return (a.mT, b.mT) if getattr(self.experts, "is_transposed", False) else (b, a)


def is_folded(layer: torch.nn.Module | None) -> bool:
    """Whether a linear's weight is not simply there: it is in 4 bits, or has an adapter."""
    return isinstance(layer, LoraLayer | Linear4bit) and not isinstance(layer, ParamWrapper)


def held(layer: torch.nn.Module, device: torch.device | None = None) -> torch.Tensor:
    """The weight (O, I) of a linear without its adapter, in float32, a quantised one as training saw it.

    On `device`, or where the layer computes: its weight may wait in host memory, its adapter does not.
    """
    base: Any = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
    at = device or device_of(layer)
    weight: torch.Tensor = _restored(base, at) if isinstance(base, Linear4bit) else base.weight.data.to(at)
    return weight.float().t() if isinstance(base, Conv1D) else weight.float()


def device_of(layer: torch.nn.Module) -> torch.device:
    """Where a linear computes: where its adapter is, if it has one."""
    parts = layer.lora_A[_adapter(layer)].parameters() if isinstance(layer, LoraLayer) else layer.parameters()
    return next(parts).device


def _restored(layer: Linear4bit, device: torch.device) -> torch.Tensor:
    """The weight in the compute dtype, on `device`: taken there in its 4 bits, which are left where they are."""
    state = copy.copy(layer.weight.quant_state)
    if state.nested:
        state.state2 = copy.copy(state.state2)
    state.to(device)
    restored: torch.Tensor = dequantize_4bit(layer.weight.data.to(device), state)
    return restored


def tuned(layer: torch.nn.Module, start: torch.Tensor) -> torch.Tensor:
    """`start` (O, I), float32, with the adapter that is on `layer`, if one is."""
    if not isinstance(layer, LoraLayer):
        return start
    delta = _delta(layer, start.device)
    return (start + delta).mul_(_dora_factor(layer, start, delta))


def noise(layer: torch.nn.Module, start: torch.Tensor) -> torch.Tensor | None:
    """By how much each number (O, I) of what `tuned` gives may differ from the same sum in another order; None for
    nothing, where there is no adapter.

    An entry of B @ A is a sum of R products, off by at most R + 2 roundings of the sum of their sizes, which is at most
    |b| |a| (Cauchy and Schwarz); there are two such sums, peft's and the one it is held against.
    """
    if not isinstance(layer, LoraLayer):
        return None
    adapter = _adapter(layer)
    a, b = (part[adapter].weight.float().to(start.device) for part in (layer.lora_A, layer.lora_B))
    sizes = torch.outer(vector_norm(b, dim=1), vector_norm(a, dim=0)).mul_(abs(layer.scaling[adapter]))
    delta = _delta(layer, start.device)
    found = sizes.mul_(2 * (len(a) + 2) * UNIT).add_((start + delta).abs_(), alpha=4 * UNIT)
    factor = _dora_factor(layer, start, delta)
    return found.mul_(factor).add_((start + delta).mul_(factor).abs_(), alpha=DORA_NOISE if has_dora(layer) else 0)


def _delta(layer: LoraLayer, device: torch.device) -> torch.Tensor:
    """What the adapter adds (O, I); peft has it as the weight lies, which is the other way about in a Conv1D."""
    delta: torch.Tensor = layer.get_delta_weight(_adapter(layer)).to(device)
    return delta.t() if isinstance(layer.get_base_layer(), Conv1D) else delta


def has_dora(layer: LoraLayer) -> bool:
    return _adapter(layer) in layer.lora_magnitude_vector


def _dora_factor(layer: LoraLayer, start: torch.Tensor, delta: torch.Tensor) -> torch.Tensor | float:
    """What every row (O, 1) is multiplied by; 1 without DoRA."""
    if not has_dora(layer):
        return 1.0
    dora = layer.lora_magnitude_vector[_adapter(layer)]
    weight = start.t() if isinstance(layer.get_base_layer(), Conv1D) else start
    return (dora.weight.float() / dora.get_weight_norm(weight, delta, scaling=1)).to(start.device).view(-1, 1)


def _adapter(layer: LoraLayer | ParamWrapper) -> str:
    (name,) = layer.active_adapters
    return name


# A model that computes in float32 whatever its weights are stored in. Every weight stays in the precision it is stored
# in and is widened where it is used: a merged model may be larger than the card that trained it, and its linears pass
# through the card one by one.

ModelT = TypeVar("ModelT", bound=torch.nn.Module)


def compute_in_float32(model: ModelT, device: str) -> ModelT:
    """Make `model` compute in float32 on `device` without holding all of it in float32.

    Linears, quantised or not, embeddings and experts keep their weights as and where they are, and widen them when
    called, experts those of a layer together; the rest (norms, adapters) is moved and widened for good.
    """
    for name, module in model.named_modules():
        forward = _FORWARD.get(type(module))
        if forward is not None and ".lora_" not in name:
            module.forward = partial(forward, module)
            continue
        stacks = plain_stacks(module)
        if stacks:
            module.forward = partial(_with_experts, module, module.forward, lambda name, stored: stored)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if any(tensor is each for each in stacks.values()):
                continue
            tensor.data = tensor.to(device, torch.float32 if tensor.is_floating_point() else tensor.dtype)
    send_inputs_to_layers(model.get_base_model() if isinstance(model, PeftModel) else model)
    return model


@contextmanager
def with_weights_of(
    live: PeftModel, merged: torch.nn.Module, rounded: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.float
) -> Iterator[None]:
    """`merged` computing with the weights of `live` in place of its own, for as long as the block lasts.

    Each linear's is folded when it is called, in float32 and then `rounded`; the rest is lent as it is. What `live`
    knows by another name or in another shape stays the merged model's.
    """
    with ExitStack() as after:
        for name, module in merged.named_modules():
            twin = layer_called(live, name)
            if isinstance(module, torch.nn.Linear | Conv1D) and twin is not None and is_folded(twin):
                after.callback(module.__dict__.__setitem__, "forward", module.forward)
                module.__dict__["forward"] = partial(_folded, module, twin, rounded)
                continue
            named = ((own, f"{name}.{own}") for own in plain_stacks(module))
            twins = {own: each for own, tensor in named if (each := LiveExperts.called(live, tensor)) is not None}
            if twins:
                after.callback(module.__dict__.__setitem__, "forward", module.forward)
                module.__dict__["forward"] = partial(_with_experts, module, module.forward, _fold_into(twins, rounded))
            twin = twin.get_base_layer() if isinstance(twin, ParamWrapper) else twin
            if twin is not None and (place := trained_rows.place_of(twin)) is not None:
                after.callback(trained_rows.replace_in(module, place).remove)
            if twin is not None:
                for own, parameter in module.named_parameters(recurse=False):
                    other = getattr(twin, own, parameter)
                    if other.shape == parameter.shape:
                        after.callback(setattr, parameter, "data", parameter.data)
                        parameter.data = other.data
        yield


Changed = Callable[[str, torch.Tensor], torch.Tensor]


def _with_experts(
    module: Any,
    forward: Callable[..., Any],
    changed: Callable[[str, torch.Tensor], torch.Tensor],
    *args: Any,
    **kw: Any,
) -> Any:
    """`forward` of a module whose experts are `changed` and widened for as long as that takes."""
    stacks = plain_stacks(module)
    before = {name: each.data for name, each in stacks.items()}
    device = next(each.device for each in (*args, *kw.values()) if isinstance(each, torch.Tensor))
    try:
        for name, each in stacks.items():
            each.data = changed(name, each.data).to(device).float()
        return forward(*args, **kw)
    finally:
        for name, each in stacks.items():
            each.data = before[name]


def _fold_into(twins: Mapping[str, LiveExperts], rounded: Callable[[torch.Tensor], torch.Tensor]) -> Changed:
    """What stands for a stack of experts by name: its twin's, folded and rounded; itself where it has none."""
    everything = slice(None)

    def changed(name: str, stored: torch.Tensor) -> torch.Tensor:
        if name not in twins:
            return stored
        return rounded(twins[name].tuned(twins[name].held(everything), everything, everything))

    return changed


def _folded(
    layer: torch.nn.Linear | Conv1D,
    twin: torch.nn.Module,
    rounded: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
) -> torch.Tensor:
    bias = None if layer.bias is None else _widened(layer.bias, x)
    return linear(x, rounded(tuned(twin, held(twin, x.device))).float(), bias)


def _linear(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    bias = None if layer.bias is None else _widened(layer.bias, x)
    rows = max(1, WIDENED_BYTES // (4 * layer.in_features))
    if rows >= layer.out_features:
        return linear(x, _widened(layer.weight, x), bias)
    output = x.new_empty(*x.shape[:-1], layer.out_features)
    for weight, part in zip(layer.weight.split(rows), output.split(rows, -1), strict=True):
        part.copy_(linear(x, _widened(weight, x)))
    return output if bias is None else output.add_(bias)


def _widened(stored: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """In float32 beside `x`: taken there as it is stored, which is half the bytes, and widened there."""
    return stored.to(x.device).float()


def _linear_4bit(layer: Linear4bit, x: torch.Tensor) -> torch.Tensor:
    """The weight as training saw it: restored in the compute dtype, and only then widened."""
    bias = None if layer.bias is None else _widened(layer.bias, x)
    return linear(x, _restored(layer, x.device).float(), bias)


def _embedding(layer: torch.nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
    return embedding(ids.to(layer.weight.device), layer.weight).to(ids.device, torch.float32)


_FORWARD: dict[type, Callable[..., torch.Tensor]] = {
    torch.nn.Linear: _linear,
    Linear4bit: _linear_4bit,
    torch.nn.Embedding: _embedding,
}
