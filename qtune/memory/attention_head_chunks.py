"""Attention a few heads at a time: projections, rotation, attention and output of one group after another.

Held less of: queries, keys, values, their rotated copies and the attention's output, which exist for one group of heads
at a time; of their gradients those that the projections need.
Costs: one more forward pass of the attention, inside a recomputed layer the third; in the backward pass the output
projection is dequantised once a group.
Refuses: attention that is not four plain projections (with norms of the head's size between them), that has parameters
of its own or drops out weights, adapters that are not plain LoRA, and one key/value head. Same loss and gradients, of
which nothing is summed up group by group in 16 bits: the groups' heads are laid side by side before they are projected
out, and the gradients of queries, keys and values before they are projected back.

A module of transformers takes the number of its heads from what its projections return, so a group is the module's own
forward with projections that return that group's heads.

Letters: T tokens, H hidden, G groups.
"""

import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch.autograd.graph import get_gradient_edge

from qtune.memory import memory_tracker, nf4
from qtune.memory.documents import documents_are, documents_here
from qtune.memory.fused_lora import Part, inner_of, lora_linear, lora_linears, why_not_fused
from qtune.memory.gradient_checkpointing import autocast_here, backward_again

INPUTS, OUTPUT = ("q_proj", "k_proj", "v_proj"), "o_proj"
OTHERS = {"q_norm", "k_norm", "rotary_emb"}


@dataclass(frozen=True)
class Backward:
    """What the groups of a backward pass share: the output projection's x A' (T, r) of all heads, and the `gradients`
    (1, T, O) of what each input projection returned, by its name, filled by one group after another."""

    inner: torch.Tensor
    gradients: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Group:
    """The heads that run now: number `index` of `count` groups, forward, or as part of a backward pass."""

    index: int
    count: int
    backward: Backward | None = None

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
    if "num_heads" in inspect.unwrap(type(attention).forward).__code__.co_names:
        return "its attention's code counts all of its heads"
    if getattr(attention, "store_full_length_kv", False):
        return "later layers read all of its keys and values"
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
        _project_in_groups(attention, name, active)

    def forward(self: torch.nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        is_plain = any(getattr(attention, name).disable_adapters for name in (*INPUTS, OUTPUT))
        has_cache = kwargs.get("past_key_values") is not None  # which wants all heads at once
        documents = kwargs.get("document_lengths") or documents_here()
        if is_plain or has_cache or documents is None:
            return whole(hidden_states, *args, **kwargs)

        def run(group: Group, hidden: torch.Tensor) -> torch.Tensor:
            active.append(group)
            try:
                with documents_are(documents):
                    return whole(hidden, *args, **kwargs)[0]
            finally:
                active.pop()

        anchor = hidden_states.new_empty(0, requires_grad=True)
        return _Grouped.apply(hidden_states, anchor, attention, run, groups), None

    attention.forward = types.MethodType(forward, attention)


def _project_in_groups(attention: Any, name: str, active: list[Group]) -> None:
    """Let a projection return (or, the output projection, take) the heads of the active group only."""
    projection = getattr(attention, name)
    whole = projection.__dict__.get("whole_forward", projection.forward)
    projection.whole_forward = whole
    project = _output if name == OUTPUT else functools.partial(_input, name)

    def forward(self: LoraLayer, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return project(self, x, active[-1]) if active else whole(x, *args, **kwargs)

    projection.forward = types.MethodType(forward, projection)


def _input(name: str, projection: LoraLayer, x: torch.Tensor, group: Group) -> torch.Tensor:
    """Queries, keys or values of the group. In a backward pass their gradient goes no further than `gradients`."""
    rows = group.share(projection.get_base_layer().out_features)
    with torch.no_grad():
        heads = lora_linear(projection, x, Part(rows=rows))
    if group.backward is None:
        return heads
    gradients = group.backward.gradients
    if name not in gradients:
        gradients[name] = heads.new_empty(*heads.shape[:-1], projection.get_base_layer().out_features)
    return _GradientInto.apply(heads, x.new_empty(0, requires_grad=True), gradients[name][..., rows])


def _output(projection: LoraLayer, x: torch.Tensor, group: Group) -> torch.Tensor:
    """The group's heads as they are; in a backward pass, in which no value is wanted, what leads to their gradient."""
    if group.backward is None:
        return x
    columns = group.share(projection.get_base_layer().in_features)
    return lora_linear(projection, x, Part(columns=columns, inner=group.backward.inner, is_skipped=True))


class _GradientInto(torch.autograd.Function):
    """`heads` as they are. Their gradient is copied to a place and goes no further: nothing holds on to them."""

    @staticmethod
    def forward(ctx: Any, heads: torch.Tensor, anchor: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        ctx.place = place
        return torch.ops.aten._unsafe_view(heads, heads.shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None, None]:
        ctx.place.copy_(gradient)
        return None, None, None


class _Grouped(torch.autograd.Function):
    """The attention of `hidden`, of which that and the output projection's x A' are kept."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, anchor: torch.Tensor, attention: Any, run: Run, groups: int
    ) -> torch.Tensor:
        projection = getattr(attention, OUTPUT)
        heads = _side_by_side(run, hidden, groups, projection.get_base_layer().in_features)
        ctx.save_for_backward(hidden, inner_of(projection, heads))
        ctx.attention, ctx.run, ctx.groups, ctx.autocast = attention, run, groups, autocast_here(hidden)
        return lora_linear(projection, heads)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None, None]:
        hidden, inner = ctx.saved_tensors
        hidden = hidden.detach()
        shared = Backward(inner, {})
        for part in memory_tracker.tiles(ctx.groups, 1, hidden):
            group = Group(part.start, ctx.groups, shared)
            backward_again(functools.partial(ctx.run, group), hidden, gradient, ctx.autocast)
        leaf = hidden.requires_grad_(ctx.needs_input_grad[0])
        projections = tuple(getattr(ctx.attention, name) for name in INPUTS)
        with torch.enable_grad(), ctx.autocast():
            edges = [get_gradient_edge(output) for output in lora_linears(projections, leaf, is_skipped=True)]
        torch.autograd.backward(edges, [shared.gradients.pop(name) for name in INPUTS])
        return leaf.grad, None, None, None, None


def _side_by_side(run: Run, hidden: torch.Tensor, groups: int, features: int) -> torch.Tensor:
    """The heads (1, T, `features`) of all groups."""
    first, *others = memory_tracker.tiles(groups, 1, hidden)
    piece = run(Group(first.start, groups), hidden)
    heads = piece.new_empty(*piece.shape[:-1], features)
    heads[..., Group(first.start, groups).share(features)] = piece
    for part in others:
        del piece  # or two of them are alive while the next is made
        group = Group(part.start, groups)
        piece = run(group, hidden)
        heads[..., group.share(features)] = piece
    return heads
