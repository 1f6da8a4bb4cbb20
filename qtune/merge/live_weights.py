"""The weights that the live model computes with, restored by bitsandbytes and added to by peft.

Nothing of what a merge is made with has a part in them, so that they can witness to it: neither its reading of the
adapter, nor its scale, nor its way through 4 bits.
"""

from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch.linalg import vector_norm

UNIT = 2.0**-24  # float32 rounds a sum or a product by at most this fraction
DORA_NOISE = 2.0**-18  # of a weight: its row's length is a sum of thousands of squares; 2**-21 is the most seen


def layer_called(model: PeftModel, name: str) -> torch.nn.Module | None:
    """The module that the base calls `name`, with its adapter around it; in its place one that was trained whole."""
    try:
        layer = model.get_base_model().get_submodule(name)
    except AttributeError:
        return None
    return layer.modules_to_save[layer.active_adapters[0]] if isinstance(layer, ModulesToSaveWrapper) else layer


def is_folded(layer: torch.nn.Module | None) -> bool:
    """Whether a linear's weight is not simply there: it is in 4 bits, or has an adapter."""
    return isinstance(layer, LoraLayer | Linear4bit)


def held(layer: torch.nn.Module) -> torch.Tensor:
    """The weight (O, I) of a linear without its adapter, in float32, a quantised one as training saw it."""
    base = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
    weight: Any = base.weight
    return (dequantize_4bit(weight.data, weight.quant_state) if isinstance(base, Linear4bit) else weight.data).float()


def tuned(layer: torch.nn.Module, start: torch.Tensor) -> torch.Tensor:
    """`start` (O, I), float32, with the adapter that is on `layer`, if one is."""
    if not isinstance(layer, LoraLayer):
        return start
    delta = layer.get_delta_weight(_adapter(layer)).to(start.device)
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
    delta = layer.get_delta_weight(adapter).to(start.device)
    found = sizes.mul_(2 * (len(a) + 2) * UNIT).add_((start + delta).abs_(), alpha=4 * UNIT)
    factor = _dora_factor(layer, start, delta)
    return found.mul_(factor).add_((start + delta).mul_(factor).abs_(), alpha=DORA_NOISE if has_dora(layer) else 0)


def has_dora(layer: LoraLayer) -> bool:
    return _adapter(layer) in layer.lora_magnitude_vector


def _dora_factor(layer: LoraLayer, start: torch.Tensor, delta: torch.Tensor) -> torch.Tensor | float:
    """What every row (O, 1) is multiplied by; 1 without DoRA."""
    if not has_dora(layer):
        return 1.0
    dora = layer.lora_magnitude_vector[_adapter(layer)]
    return (dora.weight.float() / dora.get_weight_norm(start, delta, scaling=1)).to(start.device)[:, None]


def _adapter(layer: LoraLayer) -> str:
    (name,) = layer.active_adapters
    return name
