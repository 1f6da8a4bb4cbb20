"""Experts in NF4: a mixture-of-experts layer that dequantises a few experts at a time.

Held less of: the experts, 4.13 bits a weight where transformers keeps 16 (it quantises linear layers only). For the
backward pass only the layer's input and its routing are kept: the experts are dequantised and run again there, so that
the weights and activations of one group of them live at a time.
Costs: the experts' first linear runs once more in the backward pass; an expert that is hit is dequantised once in the
forward pass, its first matrix twice and its second once in the backward pass; the scales of the layer in float32,
4 bytes for 64 weights, for the time of a pass; the host waits for the routing once a layer and pass.
Refuses: what `packed_experts.refusal` says; such experts stay in 16 bits.

A group are experts that were hit and lie one after another, of `GROUP_BYTES` at most. On a card one call multiplies
them all (`torch.nn.functional.grouped_mm`); elsewhere each is a product of its own, and the group changes no bit.

Letters: T tokens, k experts chosen for each, S = Tk pairs of token and expert, n of them a group's, E experts,
G of them in a group, H hidden, R rank of an adapter, (N, K) the shape of one expert's matrix.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import ParamWrapper as PeftParamWrapper
from torch._subclasses.fake_tensor import FakeTensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from qtune.memory import memory_tracker
from qtune.memory.gradient_checkpointing import autocast_here, compute_dtype_here
from qtune.memory.packed_experts import (
    block_scales,
    expert_modules,
    held_shape,
    is_transposed,
    matrices,
    runs_elsewhere,
    stacked_names,
)
from qtune.units import MIB

NAME = "qtune_nf4"
GROUP_BYTES = 64 * MIB  # of dequantised matrices: ten of Qwen3-30B-A3B's experts, and half of what an 8B's MLP takes
GROUPED_FROM = (8, 0)  # capability of the cards that torch multiplies in groups on (the page of grouped_mm)
GROUPED_ALIGNMENT = 16  # bytes of which each row of a grouped product has to be a multiple (`_grouped_mm` refuses else)


@dataclass(frozen=True)
class Factors:
    """An adapter on every expert of one parameter, laid out as peft does: `a` (R*E, K), `b` (N, R*E)."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


def install(model: torch.nn.Module) -> None:
    """Run the experts of `model` by `forward` from here on, packed or not.

    Of experts that are told how many rows each gets (JetMoE's), fake tensors know no numbers: they share them evenly.
    """
    for experts in expert_modules(model):
        if runs_elsewhere(experts) is None:
            experts.config._experts_implementation = NAME
        elif "expert_size" in inspect.signature(experts.forward).parameters:
            experts.forward = partial(_shared_evenly, experts.forward)


def _shared_evenly(told: Callable[..., torch.Tensor], inputs: torch.Tensor, expert_size: list[int]) -> torch.Tensor:
    if isinstance(inputs, FakeTensor):
        rows, experts = len(inputs), len(expert_size)
        expert_size = [rows * (number + 1) // experts - rows * number // experts for number in range(experts)]
    return told(inputs, expert_size)


def forward(
    experts: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """(T, H): for each token of `hidden_states` (T, H) the weighted sum of its experts; index and weights are (T, k).

    Adapters are in `experts.lent_factors`, by the name of their parameter. Fake tensors have no routing: every expert
    is taken to get the same number of tokens.
    """
    lent = experts.__dict__.get("lent_factors", {})
    factors: list[Factors | None] = [lent.get(name) for name in stacked_names(experts)]
    tensors = [tensor for each in factors for tensor in ((each.a, each.b) if each else (None, None))]
    scaling = [each.scaling if each else 0.0 for each in factors]
    result: torch.Tensor = _Experts.apply(hidden_states, top_k_weights, top_k_index, experts, scaling, *tensors)
    return result


ALL_EXPERTS_FUNCTIONS.register(NAME, forward)


class _Experts(torch.autograd.Function):
    """All experts of a layer, of which only the input, the routing and the adapters are kept."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weights: torch.Tensor,
        index: torch.Tensor,
        experts: Any,
        scaling: list[float],
        *factors: torch.Tensor | None,
    ) -> torch.Tensor:
        routes = _routes(index, experts.num_experts)
        ctx.save_for_backward(hidden, weights, routes.order, routes.ends, *factors)
        ctx.counts, ctx.arguments = routes.counts, (experts, compute_dtype_here(hidden), scaling)
        ctx.autocast = autocast_here(hidden)
        run = _Pass(*ctx.arguments)
        output = torch.zeros_like(hidden)
        for group in _groups(routes, run.most_in_a_group):
            tokens = group.pairs // weights.shape[1]
            own = _own(factors, group.experts, experts.num_experts)
            y = run.of_group(group, hidden[tokens], weights.flatten()[group.pairs], own)
            output.index_add_(0, tokens, y.to(output.dtype))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weights, order, ends, *factors = ctx.saved_tensors
        needs = (*ctx.needs_input_grad[:2], *ctx.needs_input_grad[5:])
        sums: list[Any] = [
            torch.zeros(t.shape, dtype=t.dtype, device=t.device) if need else None
            for t, need in zip((hidden, weights, *factors), needs, strict=True)
        ]
        run = _Pass(*ctx.arguments)
        for group in _groups(Routes(order, ends, ctx.counts), run.most_in_a_group):
            tokens, count = group.pairs // weights.shape[1], len(ctx.counts)
            parts = (hidden[tokens], weights.flatten()[group.pairs], *_own(factors, group.experts, count))
            leaves: list[Any] = [
                part if part is None else part.detach().requires_grad_(need)
                for part, need in zip(parts, needs, strict=True)
            ]
            with torch.enable_grad(), ctx.autocast():
                y = run.of_group(group, leaves[0], leaves[1], leaves[2:], is_wanted=False)
            wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
            gradients = iter(torch.autograd.grad(y, wanted, gradient[tokens].to(y.dtype)))
            del y, parts, leaves, wanted
            if needs[0]:
                sums[0].index_add_(0, tokens, next(gradients))
            if needs[1]:
                sums[1].view(-1)[group.pairs] = next(gradients)
            for place in _own(sums[2:], group.experts, count):
                if place is not None:
                    place.copy_(next(gradients))
        return sums[0], sums[1], None, None, None, *sums[2:]


def _own(factors: Sequence[torch.Tensor | None], own: slice, experts: int) -> list[torch.Tensor | None]:
    """A group's part of (a, b, a, b): views (G, R, K) and (G, N, R)."""
    parts: list[torch.Tensor | None] = []
    for a, b in (factors[0:2], factors[2:4]):
        parts.append(None if a is None else a.view(experts, -1, a.shape[1])[own])
        parts.append(None if b is None else b.view(b.shape[0], -1, experts)[:, :, own].permute(2, 0, 1))
    return parts


@dataclass(frozen=True)
class Routes:
    """`order`: the S pairs sorted by expert; `ends` (E,) int32: where those of each expert end in it; `counts`: how
    many each has, on the host."""

    order: torch.Tensor
    ends: torch.Tensor
    counts: list[int]


@dataclass(frozen=True)
class Group:
    """Experts that lie one after another: their `pairs` (n,), and where each expert's end in them, on the device (G,)
    int32 and on the host."""

    experts: slice
    pairs: torch.Tensor
    ends: torch.Tensor
    ends_here: list[int]


def _routes(index: torch.Tensor, experts: int) -> Routes:
    chosen = index.flatten()
    order = chosen.argsort(stable=True)
    if isinstance(chosen, FakeTensor):
        even = -(-len(order) // experts)
        return Routes(order, order.new_empty(experts, dtype=torch.int32), [even] * experts)
    counts = torch.bincount(chosen, minlength=experts)[:experts]
    return Routes(order, counts.cumsum(0, dtype=torch.int32), counts.tolist())


def _groups(routes: Routes, most: int) -> Iterator[Group]:
    """The experts that were hit, up to `most` in a group; of fake groups two and the last, as the others would hold the
    same."""
    begins = [0, *accumulate(routes.counts)]
    groups = list(_runs(routes.counts, most))
    for group in memory_tracker.tiles(len(groups), 1, routes.order):
        experts = groups[group.start]
        count = min(begins[experts.stop] - begins[experts.start], len(routes.order))
        first = min(begins[experts.start], len(routes.order) - count)  # the counts of fake tensors are rounded up
        ends_here = [min(end - begins[experts.start], count) for end in begins[experts.start + 1 : experts.stop + 1]]
        yield Group(experts, routes.order[first : first + count], routes.ends[experts] - first, ends_here)


def _runs(counts: Sequence[int], most: int) -> Iterator[slice]:
    """Experts one after another that all have something, up to `most` of them."""
    start = 0
    for end in range(1, len(counts) + 1):
        if not counts[start]:
            start = end
        elif end == len(counts) or end - start == most or not counts[end]:
            yield slice(start, end)
            start = end


class _Pass:
    """One pass over the experts of a module; the scales of its parameters live as long as this does."""

    def __init__(self, experts: Any, dtype: torch.dtype, scaling: list[float]):
        self._experts, self._dtype, self._scaling = experts, dtype, scaling
        self._parameters = [getattr(experts, name) for name in stacked_names(experts)]
        assert not any(parameter.requires_grad for parameter in self._parameters), "experts are frozen"
        self._scales = [block_scales(parameter) for parameter in self._parameters]
        has_biases = getattr(experts, "has_bias", False)
        self._biases = [getattr(experts, f"{name}_bias") if has_biases else None for name in stacked_names(experts)]
        self._is_transposed = is_transposed(experts)

    @property
    def most_in_a_group(self) -> int:
        largest = max(math.prod(held_shape(parameter)[1:]) for parameter in self._parameters)
        return max(1, GROUP_BYTES // (self._dtype.itemsize * largest))

    def of_group(
        self,
        group: Group,
        x: torch.Tensor,
        weights: torch.Tensor,
        factors: Sequence[torch.Tensor | None],
        is_wanted: bool = True,
    ) -> torch.Tensor:
        """The experts of `group` of `x` (n, H) times `weights` (n,). What is not `is_wanted` has a graph but no value.

        The weights go in before the last linear, whose output is not needed for their gradient then.
        """
        wide = self._linear(0, group, x.to(self._dtype), factors, True)
        if self._biases[0] is not None:
            wide = wide + self._bias(0, group)
        inner = self._experts._apply_gate(wide) if self._experts.has_gate else self._experts.act_fn(wide)
        y = self._linear(1, group, (inner * weights[:, None]).to(self._dtype), factors, is_wanted)
        return y if self._biases[1] is None else y + self._bias(1, group) * weights[:, None].to(self._dtype)

    def _bias(self, which: int, group: Group) -> torch.Tensor:
        """(n, N): for each pair its expert's."""
        biases: Any = self._biases[which]
        each = biases[group.experts].to(self._dtype)
        each_pairs = pairwise([0, *group.ends_here])
        return torch.cat([own.expand(end - start, -1) for own, (start, end) in zip(each, each_pairs, strict=True)])

    def _linear(
        self, which: int, group: Group, x: torch.Tensor, factors: Sequence[torch.Tensor | None], is_wanted: bool
    ) -> torch.Tensor:
        parameter, scales, dtype = self._parameters[which], self._scales[which], self._dtype
        rows = None if is_wanted else held_shape(parameter)[2 if self._is_transposed else 1]

        def fetch() -> torch.Tensor:
            stored = matrices(parameter, scales, group.experts, dtype)
            return stored.transpose(1, 2) if self._is_transposed else stored

        y: torch.Tensor = _Linear.apply(x, fetch, group, rows)
        a, b = factors[2 * which : 2 * which + 2]
        if a is None or b is None:
            return y
        low = _product(x, a.to(dtype), group)
        return y + _product(low, b.to(dtype), group) * self._scaling[which]


def _product(x: torch.Tensor, matrices: torch.Tensor, group: Group) -> torch.Tensor:
    """(n, N): each expert's rows of `x` (n, K) times its own of `matrices` (G, N, K)."""
    if len(matrices) > 1 and _is_multiplied_in_groups(x, matrices):
        stacked = matrices if 1 in matrices.stride()[1:] else matrices.contiguous()
        return torch.nn.functional.grouped_mm(x, stacked.transpose(1, 2), offs=group.ends)
    begins = [0, *group.ends_here]
    parts = [x[start:end] @ own.t() for start, end, own in zip(begins, group.ends_here, matrices, strict=False)]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _is_multiplied_in_groups(x: torch.Tensor, matrices: torch.Tensor) -> bool:
    capability = memory_tracker.capability_for(x)
    rows_are_aligned = all(width * x.element_size() % GROUPED_ALIGNMENT == 0 for width in matrices.shape[1:])
    return capability is not None and capability >= GROUPED_FROM and x.dtype == torch.bfloat16 and rows_are_aligned


class _Linear(torch.autograd.Function):
    """`x` (n, K) times a group's frozen matrices (G, N, K), fetched when due and not kept; given `rows`, N, no value is
    made."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, fetch: Callable[[], torch.Tensor], group: Group, rows: int | None
    ) -> torch.Tensor:
        ctx.fetch, ctx.group = fetch, group
        return _product(x, fetch(), group) if rows is None else x.new_zeros(1).expand(len(x), rows)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _product(gradient, ctx.fetch().transpose(1, 2), ctx.group), None, None, None


# LoRA on experts: peft's adapter of a 3-D parameter, without its sum of weight and update. Held less of: peft
# adds the update of all experts to their weights, a second (E, N, K) in 16 bits; here each expert's tokens go through
# its factors. Costs: two narrow matrix products for each expert that is hit. Refuses: dropout and DoRA, as peft does
# for parameters; more than one adapter at a time; merging into packed weights. Its files are peft's own.


def expert_targets(model: torch.nn.Module) -> list[str]:
    """What `LoraConfig(target_parameters=...)` calls the experts' parameters in `model`: `mlp.experts.down_proj`."""
    parameters: dict[str, None] = {}
    owners = {id(experts) for experts in expert_modules(model)}
    for name, module in model.named_modules():
        if id(module) in owners:
            short = ".".join(part for part in name.split(".") if part != "base_layer").split(".")[-2:]
            if runs_elsewhere(module) is None:
                parameters |= dict.fromkeys(".".join([*short, own]) for own in stacked_names(module))
    return list(parameters)


def register(config: LoraConfig, model: torch.nn.Module) -> None:
    """Have peft wrap the experts of `model` by the class below. Call before `config` meets `model`."""
    kinds = {type(experts) for experts in expert_modules(model) if runs_elsewhere(experts) is None}
    config._register_custom_module(dict.fromkeys(kinds, ParamWrapper))


class ParamWrapper(PeftParamWrapper):
    """The factors of one parameter, lent to the experts for a forward pass. peft looks for this class's name."""

    def _get_in_out_features(self, module: torch.nn.Module) -> tuple[int, int]:
        self.num_experts, rows, columns = held_shape(self.get_param())
        self._param_ndim = 3
        return rows, columns  # update_layer swaps them, as it does for every (E, N, K)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or not active:
            return self.base_layer(x, *args, **kwargs)
        assert len(active) == 1, "one adapter at a time"
        experts = self.get_base_layer()
        before = experts.__dict__.get("lent_factors", {})
        experts.lent_factors = {**before, self.parameter_name: self._factors(active[0])}
        try:
            return self.base_layer(x, *args, **kwargs)
        finally:
            experts.lent_factors = before

    def _factors(self, adapter: str) -> Factors:
        return Factors(self.lora_A[adapter].weight, self.lora_B[adapter].weight, self.scaling[adapter])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError("An adapter cannot be merged into packed experts; merge it into the 16-bit base.")
