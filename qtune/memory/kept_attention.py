"""What attention returned in the forward pass of a layer, given back where the layer is recomputed.

Held less of: nothing. Of a layer that is recomputed, attention's output (D, H, S, E) and the logarithms of its sums
(D, H, S) in float32 are held beside the input, 2THE + 4TH bytes for T tokens in 16 bits; that is what attention's
backward pass asks for besides queries, keys and values, so that attention is not run a second time.
Costs: those bytes. It saves attention's share of the recomputation, which grows with the documents.
Refuses: attention that drops out weights. What a kernel returns without those sums (math attention) is not kept, and
run again.

A dispatch mode around a call of attention sees the operation below autograd, as torch's own selective checkpointing
does: the first time it notes the results, the second time it hands them over instead, and autograd saves those. Calls
are told apart by their order. Without gradients an operation is given its results and stays noted, as it will be run
once more for its gradient (`attention_head_chunks`). Not measured on a card.

Letters: D documents, S longest of them, T tokens, H query heads, E head_dim.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

Results = TypeVar("Results")
PART = "kept attention"
KERNELS = {
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "torch_attn::_varlen_attn",
}
ASKS_FOR_SUMS = "compute_log_sumexp"  # an argument of some, false where no gradient is wanted


@dataclass
class Call:
    """One call of attention: by which operation, and what it returned; None before it has run."""

    operation: str | None = None
    results: Any = None
    _versions: list[int] = field(default_factory=list)

    def keep(self, operation: str, results: Any) -> None:
        self.operation, self.results, self._versions = operation, results, _versions_of(results)

    def has(self, operation: str) -> bool:
        """Whether it returned something by that operation, and nobody has written into it."""
        return self.operation == operation and self._versions == _versions_of(self.results)


@dataclass
class Kept:
    """The calls of attention in one layer, in their order."""

    is_again: bool = False
    _calls: deque[Call] = field(default_factory=deque)

    def next_call(self) -> Call:
        if not self.is_again or not self._calls:
            call = Call()
            if not self.is_again:
                self._calls.append(call)
            return call
        call = self._calls.popleft()
        if not torch.is_grad_enabled():
            self._calls.append(call)
        return call

    def tensors(self) -> list[torch.Tensor]:
        return [leaf for call in self._calls for leaf in _tensors_of(call.results)]


_layer: ContextVar[Kept | None] = ContextVar("_layer", default=None)
_call: ContextVar[Call | None] = ContextVar("_call", default=None)


@contextlib.contextmanager
def of_layer(kept: Kept | None) -> Iterator[None]:
    """Calls of attention inside are those of one layer; None keeps nothing of them."""
    outer = _layer.set(kept)
    try:
        yield
    finally:
        _layer.reset(outer)


@contextlib.contextmanager
def one_call() -> Iterator[None]:
    """What happens inside is one call of attention."""
    kept = _layer.get()
    if kept is None:
        yield
        return
    outer = _call.set(kept.next_call())
    try:
        with _Kernels():
            yield
    finally:
        _call.reset(outer)


def once(operation: str, run: Callable[[], Results]) -> Results:
    """What `run` returns, or what it returned in the forward pass."""
    call = _call.get()
    if call is not None and call.has(operation):
        kept: Results = tree_map_only(torch.Tensor, torch.Tensor.detach, call.results)  # a graph is hung on each
        return kept
    outer = _call.set(None)  # what is run inside makes a part of the results
    try:
        results = run()
    finally:
        _call.reset(outer)
    if call is not None and call.operation is None:
        call.keep(operation, results)
    return results


class _Kernels(TorchDispatchMode):
    """Runs each of `KERNELS` once."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operation, names = func._overloadpacket._qualified_op_name, [each.name for each in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | (kwargs or {})
        if operation not in KERNELS or given.get("dropout_p"):
            return func(*args, **(kwargs or {}))
        if ASKS_FOR_SUMS in names:
            given[ASKS_FOR_SUMS] = True
        return once(operation, lambda: func(**given))


def drops_out(layer: torch.nn.Module) -> bool:
    """Whether attention in `layer` drops out weights."""
    attentions = (module for module in layer.modules() if "Attention" in type(module).__name__)
    rates = (rate for module in attentions for name, rate in vars(module).items() if "dropout" in name)
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def _tensors_of(results: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(results) if isinstance(leaf, torch.Tensor)]


def _versions_of(results: Any) -> list[int]:
    return [tensor._version for tensor in _tensors_of(results)]
