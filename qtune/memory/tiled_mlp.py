"""Token-wise modules run in tiles of tokens: the MLP and the norms.

Held less of: what an MLP (4 to 6 times (T, I)) and a norm (5 times (T, H) in float32) save and use for all tokens at
once; they are made for one tile at a time, and again in the backward pass.
Norms that run as one operation (`memory.fused_layers`) hold nothing in float32, and are not cut.
Costs: the weights of an MLP are dequantised once a tile; without recomputation of layers one more forward pass of the
module. Inside a recomputed layer there is none: an MLP's output is only added to the residual, and no gradient needs
that value, so it is not made. One layer runs once more, once, where more is done with it than that.
Refuses: modules that mix tokens. Same loss and gradients to rounding: a tile's adapter gradients are summed up.

Letters: B rows, T tokens, H hidden, I intermediate.
"""

import types
from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from qtune.memory import fused_layers, memory_tracker, packed_experts, rng_state
from qtune.memory.gradient_checkpointing import Forward, LayerRunner, autocast_here, backward_again

NORM_TILE_TOKENS = 1024  # a norm holds (T, H) in float32: larger tiles would be the peak beside a tiled MLP


def run_in_tiles(module: torch.nn.Module, runner: LayerRunner, tokens: int, is_tail: bool) -> None:
    """Run `module`, which maps (B, T, ...) token by token, `tokens` at a time. Again on a tiled module changes that.

    `is_tail` says that the module's output may be the last summand of its layer.
    """
    whole = module.__dict__.get("whole_forward", module.forward)
    module.whole_forward = whole
    is_trained = any(parameter.requires_grad for parameter in module.parameters())

    def forward(self: torch.nn.Module, hidden: torch.Tensor, *others: Any, **named: Any) -> Any:
        if others or named or hidden.ndim < 3:  # a residual to be added, tokens without their row
            return whole(hidden, *others, **named)
        if not torch.is_grad_enabled() or not (hidden.requires_grad or is_trained):
            return _in_tiles(whole, hidden, tokens)
        if hidden.shape[1] <= tokens and not is_tail:
            return whole(hidden)
        anchor = hidden.new_empty(0, requires_grad=True)
        return _Tiled.apply(hidden, anchor, whole, runner, tokens, is_tail)

    module.forward = types.MethodType(forward, module)


def run_model_in_tiles(
    model: torch.nn.Module, layers: list[GradientCheckpointingLayer], runner: LayerRunner, tokens: int
) -> None:
    """Run the MLPs of `layers` in tiles of so many tokens, and all norms of `model` in tiles of no more than
    `NORM_TILE_TOKENS`."""
    runner.ends_in_sum.clear()
    norms = _norms_beside(model, layers)
    for layer in layers:
        mlps, inside = token_wise(layer)
        norms += inside
        for mlp in mlps:
            run_in_tiles(mlp, runner, tokens, is_tail=True)
    for norm in norms:
        if not fused_layers.is_lean(norm):
            run_in_tiles(norm, runner, min(tokens, NORM_TILE_TOKENS), is_tail=False)


def _norms_beside(model: torch.nn.Module, layers: list[GradientCheckpointingLayer]) -> list[torch.nn.Module]:
    """The norms that stand in the same module as the list of layers: the last one before the head."""
    for module in model.modules():
        held = [child for child in module.children() if isinstance(child, torch.nn.ModuleList)]
        if any(list(child) == layers for child in held):
            return [child for child in module.children() if type(child).__name__.endswith("Norm")]
    return []


def token_wise(layer: torch.nn.Module) -> tuple[list[torch.nn.Module], list[torch.nn.Module]]:
    """The MLP and the norms among the children of a decoder layer, known by their names.

    A mixture of experts is no such MLP: its experts run one after another already, and each tile would dequantise all.
    """
    children = list(layer.named_children())
    mlps = [
        child
        for name, child in children
        if name in ("mlp", "feed_forward") and not any(packed_experts.expert_modules(child))
    ]
    norms = [child for _, child in children if type(child).__name__.endswith(("Norm", "LayerNorm"))]
    return mlps, norms


def _in_tiles(forward: Forward, hidden: torch.Tensor, tokens: int) -> torch.Tensor:
    if hidden.shape[1] <= tokens:
        return forward(hidden)
    first, *others = memory_tracker.tiles(hidden.shape[1], tokens, hidden)
    piece = forward(hidden[:, first])
    output = piece.new_empty(*hidden.shape[:2], *piece.shape[2:])
    output[:, first] = piece
    for tile in others:
        del piece  # or two of them are alive while the next is made
        piece = forward(hidden[:, tile])
        output[:, tile] = piece
    return output


class _Tiled(torch.autograd.Function):
    """`forward(hidden)`, of which only `hidden` is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        anchor: torch.Tensor,
        forward: Forward,
        runner: LayerRunner,
        tokens: int,
        is_tail: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden)
        ctx.forward, ctx.tokens, ctx.autocast = forward, tokens, autocast_here(hidden)
        ctx.is_tail = is_tail
        ctx.random = rng_state.note(hidden.device) if runner.keeps_random_state else None
        if is_tail and runner.skips_tail():
            return hidden.new_zeros(1).expand(hidden.shape)
        return _in_tiles(forward, hidden, tokens)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None, None, None]:
        (hidden,) = ctx.saved_tensors
        of_input = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        with rng_state.rewound(ctx.random, hidden.device):
            for tile in memory_tracker.tiles(hidden.shape[1], ctx.tokens, hidden):
                piece = hidden[:, tile].detach().requires_grad_(of_input is not None)
                backward_again(ctx.forward, piece, gradient[:, tile], ctx.autocast)
                if of_input is not None:
                    of_input[:, tile] = piece.grad
                del piece
        return of_input, None, None, None, None, None
