"""Attention a few heads at a time: projections, rotation, attention and output of one group after another.

Held less of: queries, keys, values, their rotated copies, the attention's output and all of their gradients, which
exist for one group of heads at a time.
Costs: one more forward pass of the attention, inside a recomputed layer the third; the output projection is dequantised
once a group.
Refuses: attention that is not four plain projections (with norms of the head's size between them), that has parameters
of its own or drops out weights, adapters that are not plain LoRA, and one key/value head. Same loss and gradients to
rounding: the groups' outputs are summed.

A module of transformers takes the number of its heads from what its projections return, so a group is the module's own
forward with projections that return that group's heads.

Letters: T tokens, H hidden, G groups.
"""

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from qtune.memory import live, nf4
from qtune.memory.layers import autocast_here, backward_again
from qtune.memory.lora_linear import Part, lora_linear, why_not_fused

INPUTS, OUTPUT = ("q_proj", "k_proj", "v_proj"), "o_proj"
OTHERS = {"q_norm", "k_norm", "rotary_emb"}


@dataclass(frozen=True)
class Group:
    """The heads that run now: number `index` of `count` groups. In a backward pass `sink` (1, T, H) gathers the input's
    gradient, and the value of the output is not wanted."""

    index: int
    count: int
    sink: torch.Tensor | None = None
    is_backward: bool = False

    def share(self, features: int) -> slice:
        size = features // self.count
        return slice(self.index * size, (self.index + 1) * size)


Run = Callable[[Group, torch.Tensor], torch.Tensor]


def why_not_grouped(layer: torch.nn.Module) -> str | None:
    """Why the heads of this layer cannot be run in groups; None where they can."""
    attention: Any = getattr(layer, "self_attn", None)
    names = {name for name, _ in attention.named_children()} if attention is not None else set()
    if not {*INPUTS, OUTPUT} <= names <= {*INPUTS, OUTPUT, *OTHERS}:
        return "its attention is not made of four plain projections"
    if any(True for _ in attention.parameters(recurse=False)):
        return "its attention has parameters of its own"
    if any("dropout" in name and isinstance(rate, float) and rate > 0 for name, rate in vars(attention).items()):
        return "its attention drops out weights"
    norms = [child for name, child in attention.named_children() if name in ("q_norm", "k_norm")]
    if any(parameter.numel() != attention.head_dim for norm in norms for parameter in norm.parameters()):
        return "its attention norms all heads together"
    for name in (*INPUTS, OUTPUT):
        if why_not := why_not_fused(getattr(attention, name)):
            return f"of {name}: {why_not}"
    if not nf4.rows_fall_on_blocks(attention.k_proj.get_base_layer(), attention.head_dim):
        return "its heads do not start on a block of the quantised weights"
    return None if most_groups(layer) > 1 else "it has one key/value head"


def most_groups(layer: Any) -> int:
    """As many groups as there are key/value heads."""
    return int(layer.self_attn.k_proj.get_base_layer().out_features // layer.self_attn.head_dim)


def group_heads(layer: Any, groups: int) -> None:
    """Run the attention of `layer` in `groups` groups, of which its key/value heads are a multiple."""
    attention = layer.self_attn
    assert most_groups(layer) % groups == 0, "groups are whole key/value heads"
    whole = attention.__dict__.get("whole_forward", attention.forward)
    attention.whole_forward = whole
    active: list[Group] = []
    for name in (*INPUTS, OUTPUT):
        _project_in_groups(getattr(attention, name), active, is_output=name == OUTPUT)

    def forward(self: torch.nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        is_plain = any(getattr(attention, name).disable_adapters for name in (*INPUTS, OUTPUT))
        has_cache = kwargs.get("past_key_values") is not None  # which wants all heads at once
        if is_plain or has_cache or kwargs.get("document_lengths") is None:
            return whole(hidden_states, *args, **kwargs)

        def run(group: Group, hidden: torch.Tensor) -> torch.Tensor:
            active.append(group)
            try:
                return whole(hidden, *args, **kwargs)[0]
            finally:
                active.pop()

        anchor = hidden_states.new_empty(0, requires_grad=True)
        return _Grouped.apply(hidden_states, anchor, run, groups), None

    attention.forward = types.MethodType(forward, attention)


def _project_in_groups(projection: Any, active: list[Group], is_output: bool) -> None:
    """Let `projection` return (or, the output projection, take) the heads of the active group only."""
    whole = projection.__dict__.get("whole_forward", projection.forward)
    projection.whole_forward = whole
    base = projection.get_base_layer()

    def forward(self: LoraLayer, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not active:
            return whole(x, *args, **kwargs)
        group = active[-1]
        if is_output:
            return lora_linear(self, x, Part(columns=group.share(base.in_features), is_skipped=group.is_backward))
        return lora_linear(self, x, Part(rows=group.share(base.out_features), sink=group.sink))

    projection.forward = types.MethodType(forward, projection)


class _Grouped(torch.autograd.Function):
    """The sum of `run(group, hidden)` over the groups, of which only `hidden` is kept."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, anchor: torch.Tensor, run: Run, groups: int) -> torch.Tensor:
        ctx.save_for_backward(hidden)
        ctx.run, ctx.groups, ctx.autocast = run, groups, autocast_here(hidden)
        output = run(Group(0, groups), hidden)
        for part in live.tiles(groups, 1, hidden)[1:]:
            output += run(Group(part.start, groups), hidden)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        (hidden,) = ctx.saved_tensors
        hidden = hidden.detach()
        sink = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        for part in live.tiles(ctx.groups, 1, hidden):
            group = Group(part.start, ctx.groups, sink, is_backward=True)
            backward_again(functools.partial(ctx.run, group), hidden, gradient, ctx.autocast)
        return sink, None, None, None
