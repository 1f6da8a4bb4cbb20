"""A model that computes in float32 whatever its weights are stored in.

Every weight stays in the precision it is stored in and is widened where it is used: a merged model may be larger than
the card that trained it, and its linears pass through the card one by one.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TypeVar

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from torch.nn.functional import embedding, linear

from qtune.merge.live_weights import held, is_folded, layer_called, tuned

ModelT = TypeVar("ModelT", bound=torch.nn.Module)


def compute_in_float32(model: ModelT, device: str) -> ModelT:
    """Make `model` compute in float32 on `device` without holding all of it in float32.

    Linears, quantised or not, and embeddings keep their weights as and where they are, and widen them when called; the
    rest (norms, adapters) is moved and widened for good.
    """
    for name, module in model.named_modules():
        forward = _FORWARD.get(type(module))
        if forward is not None and ".lora_" not in name:
            module.forward = partial(forward, module)
            continue
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            tensor.data = tensor.to(device, torch.float32 if tensor.is_floating_point() else tensor.dtype)
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
            if isinstance(module, torch.nn.Linear) and twin is not None and is_folded(twin):
                after.callback(module.__dict__.__setitem__, "forward", module.forward)
                module.__dict__["forward"] = partial(_folded, module, twin, rounded)
            elif twin is not None:
                for own, parameter in module.named_parameters(recurse=False):
                    other = getattr(twin, own, parameter)
                    if other.shape == parameter.shape:
                        after.callback(setattr, parameter, "data", parameter.data)
                        parameter.data = other.data
        yield


def _folded(
    layer: torch.nn.Linear, twin: torch.nn.Module, rounded: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
) -> torch.Tensor:
    bias = None if layer.bias is None else _widened(layer.bias, x)
    return linear(x, rounded(tuned(twin, held(twin))).float(), bias)


def _linear(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    bias = None if layer.bias is None else _widened(layer.bias, x)
    return linear(x, _widened(layer.weight, x), bias)


def _widened(stored: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """In float32 beside `x`: taken there as it is stored, which is half the bytes, and widened there."""
    return stored.to(x.device).float()


def _linear_4bit(layer: Linear4bit, x: torch.Tensor) -> torch.Tensor:
    """The weight as training saw it: restored in the compute dtype, and only then widened."""
    bias = None if layer.bias is None else _widened(layer.bias, x)
    return linear(x, dequantize_4bit(layer.weight.data, layer.weight.quant_state).float(), bias)


def _embedding(layer: torch.nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
    return embedding(ids.to(layer.weight.device), layer.weight).to(ids.device, torch.float32)


_FORWARD: dict[type, Callable[..., torch.Tensor]] = {
    torch.nn.Linear: _linear,
    Linear4bit: _linear_4bit,
    torch.nn.Embedding: _embedding,
}
