"""A model that computes in float32 whatever its weights are stored in.

Every weight stays in the precision it is stored in and is widened where it is used: a merged model may be larger than
the card that trained it, and its linears pass through the card one by one.
"""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch.nn.functional import embedding, linear

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


def _linear(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    bias = None if layer.bias is None else layer.bias.to(x.device, torch.float32)
    return linear(x, layer.weight.to(x.device, torch.float32), bias)


def _linear_4bit(layer: Linear4bit, x: torch.Tensor) -> torch.Tensor:
    """The weight as training saw it: restored in the compute dtype, and only then widened."""
    bias = None if layer.bias is None else layer.bias.float()
    return linear(x, dequantize_4bit(layer.weight.data, layer.weight.quant_state).float(), bias)


def _embedding(layer: torch.nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
    return embedding(ids.to(layer.weight.device), layer.weight).to(ids.device, torch.float32)


_FORWARD: dict[type, Callable[..., torch.Tensor]] = {
    torch.nn.Linear: _linear,
    Linear4bit: _linear_4bit,
    torch.nn.Embedding: _embedding,
}
