"""Experts as they are held in NF4: one packed parameter for all experts of a layer, read a few experts at a time.

Held less of: 4.13 bits a weight with double quantisation, 4.5 without, where transformers keeps 16.
Costs: nothing here; see `mixture_of_experts`.
Refuses: experts that each end in a norm, matrices that are not a whole number of
quantisation blocks, and classes that transformers does not run through its experts interface; `refusal` says which.

transformers 5 holds a layer's experts as two parameters (E, N, K). Packed, such a parameter is bitsandbytes' for the
whole stack: 4-bit codes in `data`, everything else in `quant_state`. As each matrix starts on a block of 64 weights,
it can be dequantised alone. Some hold matrices that are multiplied from the right, (E, K, N), and are packed as they
are.

Letters: E experts, G of them one after another, (N, K) the shape of one expert's matrix.
"""

from collections.abc import Iterator
from typing import Any

import torch
from bitsandbytes.functional import QuantState, dequantize_blockwise, quantize_4bit, quantize_blockwise
from bitsandbytes.nn import Params4bit

from qtune.memory import nf4
from qtune.memory.nf4 import BLOCK, OUTER_BLOCK


def expert_modules(model: torch.nn.Module) -> Iterator[Any]:
    """The modules of `model` that hold the matrices of several experts in one 3-D parameter."""
    for module in model.modules():
        if "Expert" in type(module).__name__ and any(_is_stack(p) for p in module.parameters(recurse=False)):
            yield module


def _is_stack(parameter: torch.nn.Parameter) -> bool:
    return parameter.ndim == 3 or is_packed(parameter)


def plain_stacks(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Parameters of a module that hold the matrices of several experts, not packed, by name."""
    if "Expert" not in type(module).__name__:
        return {}
    own = module.named_parameters(recurse=False)
    return {name: each for name, each in own if each.ndim == 3 and not is_packed(each)}


def is_packed(parameter: Any) -> bool:
    return getattr(parameter, "quant_state", None) is not None


def stacked_names(experts: Any) -> tuple[str, str]:
    """The names of the two parameters: what goes into the experts' activation, and what comes out of it."""
    return "gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj", "down_proj"


def router_names(model: torch.nn.Module) -> set[str]:
    """Full names of the linears that choose experts: beside experts, with an output for each of them, or one to weigh
    what all tokens share."""
    named = dict(model.named_modules())
    owners = {id(module): name for name, module in named.items()}
    found: set[str] = set()
    for experts in expert_modules(model):
        count = held_shape(next(each for each in experts.parameters(recurse=False) if _is_stack(each)))[0]
        own = owners[id(experts)]
        beside = own.rpartition(".")[0]
        found |= {
            name
            for name, module in named.items()
            if name.startswith(f"{beside}.") and not name.startswith(f"{own}.")
            if getattr(module, "out_features", None) in (count, 1)
        }
    return found


def is_transposed(experts: Any) -> bool:
    """Whether its matrices are multiplied from the right."""
    return bool(getattr(experts, "is_transposed", False))


def runs_elsewhere(experts: Any) -> str | None:
    """Why the experts of one module cannot be run by `mixture_of_experts`; None where they can, packed or not."""
    if not hasattr(experts, "_apply_gate") or not hasattr(experts, "is_transposed"):
        return "transformers does not run them through its experts interface"
    if getattr(experts, "has_post_expert_norm", False):
        return "each ends in a norm"
    for name in stacked_names(experts):
        parameter = getattr(experts, name, None)
        if parameter is None or not _is_stack(parameter):
            return f"they have no {name} with one matrix an expert"
    return None


def refusal(experts: Any) -> str | None:
    """Why the experts of one module stay in 16 bits; None where they can be held in NF4."""
    why = runs_elsewhere(experts)
    for name in () if why else stacked_names(experts):
        _, rows, columns = held_shape(getattr(experts, name))
        if rows * columns % BLOCK:
            why = f"{rows} x {columns} weights of {name} are not a multiple of the {BLOCK} that NF4 scales together"
    return why and f"the experts of {type(experts).__name__} stay in 16 bits: {why}"


def is_expert_parameter(model: torch.nn.Module, name: str) -> bool:
    """Whether the parameter `name` of `model` is a stack of experts that can be packed."""
    owner, _, own_name = name.rpartition(".")
    experts = model.get_submodule(owner)
    return hasattr(experts, "_apply_gate") and own_name in stacked_names(experts) and refusal(experts) is None


def refusals(model: torch.nn.Module) -> tuple[str, ...]:
    """Every reason for which experts of `model` stay in 16 bits, once each."""
    return tuple(dict.fromkeys(why for experts in expert_modules(model) if (why := refusal(experts)) is not None))


def held_shape(parameter: Any) -> torch.Size:
    """(E, N, K), packed or not."""
    shape: torch.Size = parameter.quant_state.shape if is_packed(parameter) else parameter.shape
    return shape


def pack(matrices: Iterator[torch.Tensor], shape: torch.Size, double: bool) -> Params4bit:
    """E matrices (N, K), one at a time, as one NF4 parameter of `shape` (E, N, K) on their device.

    The bits are those of `bitsandbytes.functional.quantize_4bit` for the whole (E, N, K) tensor.
    """
    packed, state = torch.empty(0), QuantState(torch.empty(0))
    for expert, matrix in enumerate(matrices):
        part, own = quantize_4bit(matrix.contiguous(), blocksize=BLOCK, quant_type="nf4")
        if expert == 0:
            packed, state = part.new_empty(shape[0], *part.shape), own
            scales = own.absmax.new_empty(shape[0], *own.absmax.shape)
        packed[expert], scales[expert] = part, own.absmax
        del matrix
    state.shape, state.absmax = shape, scales.flatten()
    if double:
        state.offset = state.absmax.mean()
        state.absmax, state.state2 = quantize_blockwise(state.absmax - state.offset, blocksize=OUTER_BLOCK)
        state.nested = True
    return packed_parameter(packed.flatten(0, 1), state, double)


def packed_parameter(codes: torch.Tensor, state: QuantState, double: bool) -> Params4bit:
    """bitsandbytes' parameter of NF4 `codes` that are there already; `double`: their scales are in 8 bits."""
    return Params4bit(
        codes,
        requires_grad=False,
        quant_state=state,
        blocksize=BLOCK,
        compress_statistics=double,
        quant_type="nf4",
        bnb_quantized=True,
    )


def packed_like(parameter: torch.Tensor, double: bool) -> Any:
    """What `pack` makes of a parameter (E, N, K), without values: on the device, and of the mode, that is active."""
    return nf4.empty_packed(tuple(parameter.shape), parameter.dtype, double)


def packed_tensors(experts: Any) -> list[tuple[Any, str]]:
    """(owner, attribute) of every tensor that holds the weights of packed experts, to be moved or replaced."""
    places: list[tuple[Any, str]] = []
    for name in stacked_names(experts):
        parameter = getattr(experts, name)
        if is_packed(parameter):
            state = parameter.quant_state
            places += [(parameter, "data"), (state, "absmax")]
            places += [(state.state2, "absmax")] if state.nested else []
    return places


def block_scales(parameter: Any) -> torch.Tensor | None:
    """The scale of every block, in float32."""
    if not is_packed(parameter):
        return None
    state = parameter.quant_state
    if not state.nested:
        scales: torch.Tensor = state.absmax
        return scales
    nested: torch.Tensor = dequantize_blockwise(state.absmax, state.state2)
    return nested.add_(state.offset)


def matrices(parameter: Any, scales: torch.Tensor | None, experts: slice, dtype: torch.dtype) -> torch.Tensor:
    """(G, N, K) of the G `experts`, one after another, in `dtype`; packed ones are restored in the dtype they had."""
    if scales is None:
        plain: torch.Tensor = parameter.detach()[experts].to(dtype)
        return plain
    count, rows, columns = parameter.quant_state.shape
    first, last, _ = experts.indices(count)
    weights = slice(first * rows * columns, last * rows * columns)
    own_scales = scales[weights.start // BLOCK : weights.stop // BLOCK]
    restored = nf4.dequantised(parameter, weights, own_scales, parameter.quant_state.dtype)
    return restored.view(-1, rows, columns).to(dtype)
