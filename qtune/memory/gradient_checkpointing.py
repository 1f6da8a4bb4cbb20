"""The decoder layers, run one at a time: recomputed in the backward pass, their inputs kept here or in host memory.

Held less of: everything a layer saves for its gradient. Only its input of (B, T, H) is kept, on the device or in
pinned host memory, and where there is room what its attention returned (`kept_attention`); the layer runs again when
its gradient is due. What else it is given that has a gradient (an input of its own of each layer, keys and values that
an earlier layer shares with it) is there already, and stays.
Costs: one more forward pass of the layer, a third of the time; inputs in host memory 2BTH bytes a layer there, copied
on a stream of their own while the device computes.
Refuses: models whose decoder layers cannot be found, or hand each other more than their output.

transformers calls a layer through its own hook for recomputation, `_gradient_checkpointing_func`, which is set here to
ours. The backward pass of a layer is a pass of its own inside that of the model, so that whatever the layer needs (its
input, its streamed weights) is there for that time and no longer.

Letters: B rows, T tokens, H hidden, L layers.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch.autograd.graph import get_gradient_edge
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from qtune.memory import kept_attention, memory_tracker, rng_state
from qtune.memory.documents import documents_are, documents_here
from qtune.memory.kept_attention import Kept

if TYPE_CHECKING:  # what a runner is given when these are switched on
    from qtune.memory.activation_offload import HostBuffers
    from qtune.memory.weight_streaming import LayerStream

Forward = Callable[..., Any]  # of hidden states and what else has a gradient
Shared = MutableMapping[str, tuple[torch.Tensor, ...]]
SHARED = "shared_kv_states"  # as the layers of Gemma 3n and 4 call the keys and values that some leave for others


def find_layers(model: PreTrainedModel | PeftModel) -> list[GradientCheckpointingLayer]:
    """The decoder layers in the order they run; empty where a model does not keep them in one list.

    `model` is a causal model or an adapter on one. A model that also sees has layers that are not the decoder's.
    """
    causal = model.get_base_model() if isinstance(model, PeftModel) else model
    lists = [
        list(module)
        for module in (causal.get_decoder() or causal).modules()
        if isinstance(module, torch.nn.ModuleList)
        and len(module) > 0
        and all(isinstance(layer, GradientCheckpointingLayer) for layer in module)
    ]
    return lists[0] if len(lists) == 1 else []


@dataclass
class LayerRunner:
    """Runs the layers of one model. What it is told may change between steps: a run out of memory climbs a rung."""

    layers: list[GradientCheckpointingLayer]
    host: "HostBuffers | None" = None
    stream: "LayerStream | None" = None
    is_recomputing: bool = False
    keeps_random_state: bool = False
    attention_again: int = 0  # of so many layers attention is run again, too; the others keep what it returned
    ends_in_sum: dict[int, bool] = field(default_factory=dict)

    def skips_tail(self) -> bool:
        """Whether the layer being recomputed leaves out what only its output needs; who asks does so then. One of which
        that is not known yet is tried without, but where another layer was in need of it."""
        may_skip = self.ends_in_sum.get(self._index, all(self.ends_in_sum.values()))
        self._has_skipped = self.is_recomputing and may_skip and not self.keeps_random_state
        return self._has_skipped

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
                stream.come_to(index, is_forward=True, trains=layer.training)

        return before_layer

    def _checkpoint_of(self, index: int) -> Callable[..., Any]:
        def checkpoint(forward: functools.partial[Any], hidden: torch.Tensor, *others: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(hidden, *others)
            shared = forward.keywords.get(SHARED)
            call = _LayerCall.of(forward, others, shared)
            # the first layer's input needs no gradient, its adapter does
            anchor = hidden.new_empty(0, requires_grad=True)
            return call.share(_Recomputed.apply(hidden, anchor, call.run, self, index, *call.tensors), shared)

        return checkpoint

    def run_again(self, index: int, forward: Forward, *inputs: torch.Tensor) -> list[Any]:
        """The layer's outputs with their graph, as the edges that a backward pass starts from; None for one without."""
        if self.stream is not None:
            self.stream.come_to(index, is_forward=False, trains=True)
        self.is_recomputing, self._index = True, index
        try:
            output = forward(*inputs) if index in self.ends_in_sum else self._for_the_first_time(index, forward, inputs)
        finally:
            self.is_recomputing = False
        outputs = output if isinstance(output, tuple) else (output,)
        return [get_gradient_edge(each) if getattr(each, "requires_grad", False) else None for each in outputs]

    def _for_the_first_time(self, index: int, forward: Forward, inputs: tuple[torch.Tensor, ...]) -> Any:
        """The output of a layer, without its tail where that turns out not to be needed: of all passes this one would
        hold most otherwise."""
        self._has_skipped = False
        try:
            output = forward(*inputs)
            self.ends_in_sum[index] = isinstance(output, torch.Tensor) and _ends_in_sum(output)
        except RuntimeError as fault:  # zeros are there in one place only, and something writes to them
            if not self._has_skipped or isinstance(fault, torch.OutOfMemoryError):
                raise
            self.ends_in_sum[index] = False
        if self._has_skipped and not self.ends_in_sum[index]:
            output = None  # and all that it leads to
            output = forward(*inputs)
        return output

    _index: int = -1
    _has_skipped: bool = False


def _ends_in_sum(output: torch.Tensor) -> bool:
    """Whether a layer's output is its residual plus the output of its tail, whose value no gradient needs.

    A norm behind the tail is tiled too, and does need it.
    """
    node = output.grad_fn
    if node is None or node.name() != "AddBackward0":
        return False
    return any(getattr(before, "is_tail", False) for before, _ in node.next_functions)


@dataclass
class _LayerCall:
    """One call of a layer's `forward(hidden, *arguments)`, of which the `tensors` that have a gradient are taken out,
    to be given anew as leaves. So are those that earlier layers share, to which the layer may add others, the `made`
    ones. It does not hold the mapping that these go to, which leads back to it."""

    forward: Callable[..., Any]
    leaves: list[Any]
    layout: pytree.TreeSpec
    documents: tuple[int, ...] | None  # which a backward pass is not told otherwise
    shares: Callable[[Shared], Shared] | None
    made: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, forward: functools.partial[Any], arguments: tuple[Any, ...], shared: Shared | None) -> "_LayerCall":
        """`forward` has its keywords bound to it, as transformers hands it over."""
        keywords = {name: value for name, value in forward.keywords.items() if name != SHARED}
        before = {} if shared is None else dict(shared)  # as it is now, whatever is added later
        leaves, layout = pytree.tree_flatten((arguments, keywords, before))
        bare = functools.partial(forward.func, *forward.args)
        return cls(bare, leaves, layout, documents_here(), None if shared is None else type(shared))

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [leaf for leaf in self.leaves if _has_gradient(leaf)]

    def run(self, hidden: torch.Tensor, *tensors: torch.Tensor) -> Any:
        """What the layer returns, and behind that the tensors that it shares."""
        with documents_are(self.documents):
            return self._run(hidden, *tensors)

    def _run(self, hidden: torch.Tensor, *tensors: torch.Tensor) -> Any:
        given = iter(tensors)
        leaves = [next(given) if _has_gradient(leaf) else leaf for leaf in self.leaves]
        arguments, keywords, before = pytree.tree_unflatten(leaves, self.layout)
        if self.shares is None:
            return self.forward(hidden, *arguments, **keywords)
        now = self.shares(before)
        output = self.forward(hidden, *arguments, **keywords, **{SHARED: now})
        made = {key: value for key, value in now.items() if value is not before.get(key)}
        self.made = {key: len(value) for key, value in made.items()}
        if not made:
            return output
        return *(output if isinstance(output, tuple) else (output,)), *(x for value in made.values() for x in value)

    def share(self, results: Any, shared: Shared | None) -> Any:
        """What the layer returned, once the tensors behind it are `shared`, with the graph that leads to them."""
        if shared is None or not self.made:
            return results
        count = len(results) - sum(self.made.values())
        behind = iter(results[count:])
        for key, parts in self.made.items():
            shared[key] = tuple(itertools.islice(behind, parts))
        return results[0] if count == 1 else results[:count]


def _has_gradient(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.requires_grad


class _Recomputed(torch.autograd.Function):
    """`forward(hidden, *others)`, a tensor or a tuple with some, of which only `hidden` is kept, and the `others`, of
    which each has a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        anchor: torch.Tensor,
        forward: Forward,
        runner: LayerRunner,
        index: int,
        *others: torch.Tensor,
    ) -> Any:
        ctx.set_materialize_grads(False)
        memory_tracker.enter_phase("forward")
        ctx.forward, ctx.runner, ctx.index = forward, runner, index
        ctx.autocast = autocast_here(hidden)
        ctx.random = rng_state.note(hidden.device) if runner.keeps_random_state else None
        ctx.device, ctx.host = hidden.device, runner.host
        ctx.kept = Kept() if index >= runner.attention_again else None
        is_leaving: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if ctx.host is None:
            memory_tracker.mark([hidden], "checkpoints")
            ctx.save_for_backward(hidden, *others)
        else:
            is_leaving = ctx.host.putting(index, hidden)
            ctx.save_for_backward(*others)
        with is_leaving, kept_attention.of_layer(ctx.kept):
            output = forward(hidden, *others)
        if ctx.kept is not None:
            memory_tracker.mark(ctx.kept.tensors(), kept_attention.PART)
            ctx.kept.is_again = True
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        runner, index = ctx.runner, ctx.index
        memory_tracker.enter_layer_backward(index)
        inputs = ctx.saved_tensors if ctx.host is None else (ctx.host.get(index, ctx.device), *ctx.saved_tensors)
        needed = (ctx.needs_input_grad[0], *ctx.needs_input_grad[5:])
        inputs = tuple(x.detach().requires_grad_(is_due) for x, is_due in zip(inputs, needed, strict=True))
        with kept_attention.of_layer(ctx.kept):
            with torch.enable_grad(), ctx.autocast(), rng_state.rewound(ctx.random, ctx.device):
                edges = runner.run_again(index, ctx.forward, *inputs)
            pairs = [pair for pair in zip(edges, gradients, strict=True) if None not in pair]
            torch.autograd.backward([edge for edge, _ in pairs], [gradient for _, gradient in pairs])
        hidden, *others = inputs
        return hidden.grad, None, None, None, None, *(x.grad for x in others)


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
