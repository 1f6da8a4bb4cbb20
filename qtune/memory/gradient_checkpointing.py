"""The decoder layers, run one at a time: recomputed in the backward pass, their inputs kept here or in host memory.

Held less of: everything a layer saves for its gradient. Only its input of (B, T, H) is kept, on the device or in
pinned host memory, and the layer runs again when its gradient is due.
Costs: one more forward pass of the layer, a third of the time; inputs in host memory 2BTH bytes a layer there, copied
on a stream of their own while the device computes.
Refuses: models whose decoder layers cannot be found, or hand each other more than their output.

transformers calls a layer through its own hook for recomputation, `_gradient_checkpointing_func`, which is set here to
ours. The backward pass of a layer is a pass of its own inside that of the model, so that whatever the layer needs (its
input, its streamed weights) is there for that time and no longer.

Letters: B rows, T tokens, H hidden, L layers.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch.autograd.graph import get_gradient_edge
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from qtune.memory import memory_tracker, rng_state
from qtune.memory.documents import documents_are, documents_here

if TYPE_CHECKING:  # what a runner is given when these are switched on
    from qtune.memory.activation_offload import HostBuffers
    from qtune.memory.weight_streaming import LayerStream

Forward = Callable[[torch.Tensor], Any]


def find_layers(model: PreTrainedModel | PeftModel) -> list[GradientCheckpointingLayer]:
    """The decoder layers in the order they run; empty where a model does not keep them in one list.

    `model` is a causal model or an adapter on one. A model that also sees has layers that are not the decoder's. Layers
    that read an earlier one's keys and values are none that can be run by themselves: their gradient goes there, too.
    """
    causal = model.get_base_model() if isinstance(model, PeftModel) else model
    lists = [
        list(module)
        for module in (causal.get_decoder() or causal).modules()
        if isinstance(module, torch.nn.ModuleList)
        and len(module) > 0
        and all(isinstance(layer, GradientCheckpointingLayer) for layer in module)
    ]
    shares_keys = any(getattr(module, "is_kv_shared_layer", False) for module in causal.modules())
    return lists[0] if len(lists) == 1 and not shares_keys else []


@dataclass
class LayerRunner:
    """Runs the layers of one model. What it is told may change between steps: a run out of memory climbs a rung."""

    layers: list[GradientCheckpointingLayer]
    host: "HostBuffers | None" = None
    stream: "LayerStream | None" = None
    is_recomputing: bool = False
    keeps_random_state: bool = False
    ends_in_sum: dict[int, bool] = field(default_factory=dict)

    @property
    def skips_tail(self) -> bool:
        """Whether the layer being recomputed may leave out what only its output needs."""
        return self.is_recomputing and self.ends_in_sum.get(self._index, False) and not self.keeps_random_state

    def recompute(self, count: int) -> None:
        """Recompute the first `count` layers; the others keep what they save."""
        for index, layer in enumerate(self.layers):
            layer.gradient_checkpointing = index < count
            layer._gradient_checkpointing_func = self._checkpoint_of(index)

    def stream_with(self, stream: "LayerStream") -> None:
        """Bring in a layer's weights before it runs, in training and in evaluation."""
        assert self.stream is None, "streaming is switched on once"
        self.stream = stream
        for index, layer in enumerate(self.layers):
            layer.register_forward_pre_hook(self._bring_in(index, stream))

    def _bring_in(self, index: int, stream: "LayerStream") -> Callable[..., None]:
        def before_layer(layer: torch.nn.Module, arguments: Any) -> None:
            if not self.is_recomputing:
                stream.bring_in(index, is_forward=True, goes_round=not layer.training)

        return before_layer

    def _checkpoint_of(self, index: int) -> Callable[..., Any]:
        def checkpoint(forward: Callable[..., Any], hidden: torch.Tensor, *others: Any) -> Any:
            documents = documents_here()

            def run(x: torch.Tensor) -> Any:
                with documents_are(documents):  # which a backward pass is not told otherwise
                    return forward(x, *others)

            if not torch.is_grad_enabled():
                return run(hidden)
            # the first layer's input needs no gradient, its adapter does
            anchor = hidden.new_empty(0, requires_grad=True)
            return _Recomputed.apply(hidden, anchor, run, self, index)

        return checkpoint

    def run_again(self, index: int, forward: Forward, hidden: torch.Tensor) -> list[Any]:
        """The layer's outputs with their graph, as the edges that a backward pass starts from; None for one without."""
        if self.stream is not None:
            self.stream.bring_in(index, is_forward=False)
        self.is_recomputing, self._index = True, index
        try:
            output = forward(hidden)
        finally:
            self.is_recomputing = False
        if index not in self.ends_in_sum:
            self.ends_in_sum[index] = isinstance(output, torch.Tensor) and _ends_in_sum(output)
        outputs = output if isinstance(output, tuple) else (output,)
        return [get_gradient_edge(each) if getattr(each, "requires_grad", False) else None for each in outputs]

    _index: int = -1


def _ends_in_sum(output: torch.Tensor) -> bool:
    """Whether a layer's output is its residual plus the output of its tail, whose value no gradient needs.

    A norm behind the tail is tiled too, and does need it.
    """
    node = output.grad_fn
    if node is None or node.name() != "AddBackward0":
        return False
    return any(getattr(before, "is_tail", False) for before, _ in node.next_functions)


class _Recomputed(torch.autograd.Function):
    """`forward(hidden)`, a tensor or a tuple with some, of which only `hidden` is kept."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, anchor: torch.Tensor, forward: Forward, runner: LayerRunner, index: int
    ) -> Any:
        ctx.set_materialize_grads(False)
        memory_tracker.enter_phase("forward")
        ctx.forward, ctx.runner, ctx.index = forward, runner, index
        ctx.autocast = autocast_here(hidden)
        ctx.random = rng_state.note(hidden.device) if runner.keeps_random_state else None
        ctx.device, ctx.host = hidden.device, runner.host
        if ctx.host is not None:
            with ctx.host.putting(index, hidden):
                return forward(hidden)
        memory_tracker.mark([hidden], "checkpoints")
        ctx.save_for_backward(hidden)
        return forward(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, None, None, None, None]:
        runner, index = ctx.runner, ctx.index
        memory_tracker.enter_layer_backward(index)
        hidden = ctx.saved_tensors[0] if ctx.host is None else ctx.host.get(index, ctx.device)
        hidden = hidden.detach().requires_grad_(ctx.needs_input_grad[0])
        with torch.enable_grad(), ctx.autocast(), rng_state.rewound(ctx.random, ctx.device):
            edges = runner.run_again(index, ctx.forward, hidden)
        pairs = [pair for pair in zip(edges, gradients, strict=True) if None not in pair]
        torch.autograd.backward([edge for edge, _ in pairs], [gradient for _, gradient in pairs])
        return hidden.grad, None, None, None, None


def backward_again(
    forward: Forward, hidden: torch.Tensor, gradient: torch.Tensor, autocast: Callable[[], torch.autocast]
) -> None:
    """Run `forward(hidden)` once more, with its graph, and its backward pass; its output is gone by then."""
    with torch.enable_grad(), autocast():
        output = forward(hidden)
    edge = get_gradient_edge(output)
    del output
    torch.autograd.backward(edge, gradient)


def compute_dtype_here(tensor: torch.Tensor) -> torch.dtype:
    """What a product with `tensor` is computed in now: autocast's dtype where that is on."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def autocast_here(tensor: torch.Tensor) -> Callable[[], torch.autocast]:
    """The autocast that is on now, to be entered again in the backward pass, where none is."""
    kind = tensor.device.type
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return lambda: torch.autocast(kind, dtype, enabled)
