"""The norms, rotary embeddings and gated MLPs of a model, run as the operations of `memory.layer_ops`.

They are known by what they compute: a class of transformers, or of anybody, is tried on a few random numbers beside the
operation that would stand in for it, and left alone where it gives anything else. A module whose weight is trained, or
of another dtype than what it is given, runs its own forward.
"""

import copy
import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from qtune.memory import layer_ops
from qtune.memory.layer_ops import ACTIVATIONS, Activation, GatedProduct

WIDTH, ROWS = 10, 3  # of what a class is tried on; chosen
APART, JOINED, DOWN = ("gate_proj", "up_proj"), ("gate_up_proj",), "down_proj"  # Llama's linears, and Phi-3's
ROTATION = "apply_rotary_pos_emb"  # what transformers' attention calls it


def install(model: torch.nn.Module) -> None:
    """Let every module of `model` that is known run as one operation."""
    for module in model.modules():
        for known in (_as_norm, _as_rotating, _as_gated):
            forward = known(module)
            if forward is not None:
                module.forward = types.MethodType(forward, module)
                break


def is_lean(norm: torch.nn.Module) -> bool:
    """Whether this norm runs as one operation, which holds nothing in float32."""
    return hasattr(norm.__dict__.get("forward"), "is_lean")


Forward = Callable[..., Any]


def _tensor(output: Any) -> torch.Tensor:
    assert isinstance(output, torch.Tensor)
    return output


@torch.no_grad()
def _is_same(theirs: Callable[[], Any], ours: Callable[[], Any]) -> bool:
    """Whether both give the same tensors. Theirs is tried outside of what it was made for, so anything may go wrong."""
    try:
        torch.testing.assert_close(ours(), theirs(), rtol=1e-5, atol=1e-6)
    except Exception:
        return False
    return True


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), device="cpu")


# ---- norms


def _as_norm(norm: torch.nn.Module) -> Forward | None:
    """The forward of an RMSNorm over the last dimension."""
    weight = getattr(norm, "weight", None)
    epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    is_plain = isinstance(weight, torch.nn.Parameter) and weight.ndim == 1 and len(norm._parameters) == 1
    if not is_plain or not isinstance(epsilon, float) or any(norm.children()):
        return None
    is_offset = next((offset for offset in (False, True) if _is_norm(norm, epsilon, offset)), None)
    if is_offset is None:
        return None
    whole = norm.forward

    def forward(self: Any, x: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
        weight = self.weight
        if others or named or weight.requires_grad or x.dtype != weight.dtype or x.shape[-1] != len(weight):
            return _tensor(whole(x, *others, **named))
        return layer_ops.rms_norm(x, weight, epsilon, is_offset)

    forward.is_lean = True  # type: ignore[attr-defined]
    return forward


def _is_norm(norm: torch.nn.Module, epsilon: float, is_offset: bool) -> bool:
    with unset_fake_temporarily():
        alike = copy.copy(norm)
        weight = torch.nn.Parameter(_random(WIDTH), requires_grad=False)
        alike._parameters = {"weight": weight}
        rows = torch.cat([_random(1, ROWS, WIDTH), epsilon**0.5 * _random(1, ROWS, WIDTH)])  # epsilon must matter
        return _is_same(
            lambda: type(norm).forward(alike, rows), lambda: layer_ops.rms_norm(rows, weight, epsilon, is_offset)
        )


# ---- rotary embeddings


def _as_rotating(attention: torch.nn.Module) -> Forward | None:
    """The forward of an attention module with our rotation for the one that its own module of Python has.

    It is the same code with globals of its own: nobody else's attention changes.
    """
    forward = type(attention).forward
    if not isinstance(forward, types.FunctionType) or ROTATION not in forward.__code__.co_names:
        return None
    theirs = forward.__globals__.get(ROTATION)
    if theirs is None or not _rotates(theirs):
        return None
    names = {**forward.__globals__, ROTATION: _rotation_beside(theirs)}
    made = types.FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    made.__kwdefaults__ = forward.__kwdefaults__
    return made


def _rotation_beside(theirs: Forward) -> Forward:
    """Queries and keys rotated by ours; by `theirs` where they come with anything that ours does not know."""

    @functools.wraps(theirs)
    def rotate(q: Any, k: Any, cos: Any, sin: Any, *others: Any, **named: Any) -> Any:
        is_known = not others and named.get("unsqueeze_dim", 1) == 1 and not named.keys() - {"unsqueeze_dim"}
        tensors = (q, k, cos, sin)
        if not is_known or any(t.shape[-1] != q.shape[-1] or t.dtype != q.dtype for t in tensors) or cos.ndim != 3:
            return theirs(q, k, cos, sin, *others, **named)
        return layer_ops.rotary(q, cos, sin), layer_ops.rotary(k, cos, sin)

    return rotate


@functools.cache
def _rotates(theirs: Forward) -> bool:
    with unset_fake_temporarily():
        q, k = _random(2, 4, ROWS, WIDTH), _random(2, 2, ROWS, WIDTH)
        cos, sin = _random(2, ROWS, WIDTH), -_random(2, ROWS, WIDTH).flip(0)
        return _is_same(
            lambda: theirs(q, k, cos, sin), lambda: (layer_ops.rotary(q, cos, sin), layer_ops.rotary(k, cos, sin))
        )


# ---- gated MLPs


def _as_gated(mlp: torch.nn.Module) -> Forward | None:
    """The forward of an MLP that is down_proj(activation(gate) * up), of two linears or of the halves of one."""
    names = {name for name, child in mlp.named_children() if isinstance(child, torch.nn.Linear)}
    inputs = next((each for each in (APART, JOINED) if names == {*each, DOWN}), None)
    if inputs is None or any(True for _ in mlp.parameters(recurse=False)):
        return None
    activation = next((each for each in ACTIVATIONS if _is_gated(mlp, inputs, each)), None)
    if activation is None:
        return None
    whole = mlp.forward

    def forward(self: Any, x: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
        if others or named:
            return _tensor(whole(x, *others, **named))
        gate, up = _gate_and_up(self, inputs, x)
        product = GatedProduct(gate, up, activation)
        takes_product = hasattr(self.down_proj.forward, "takes_product")  # an adapted linear of `memory.fused_lora`
        return _tensor(self.down_proj(product if takes_product else product.value()))

    return forward


def _gate_and_up(mlp: Any, inputs: Sequence[str], x: torch.Tensor) -> Sequence[torch.Tensor]:
    made = [getattr(mlp, name)(x) for name in inputs]
    return made if len(made) == 2 else made[0].chunk(2, dim=-1)


def _is_gated(mlp: torch.nn.Module, inputs: Sequence[str], activation: Activation) -> bool:
    with unset_fake_temporarily():
        alike: Any = copy.copy(mlp)
        width = WIDTH * 2 // len(inputs)
        linears = {name: _linear(number, width) for number, name in enumerate(inputs)}
        alike._modules = mlp._modules | linears | {DOWN: _linear(len(inputs), WIDTH)}
        x = _random(1, ROWS, WIDTH)

        def ours() -> Any:
            gate, up = _gate_and_up(alike, inputs, x)
            return alike.down_proj(layer_ops.gated(gate, up, activation))

        return _is_same(lambda: type(mlp).forward(alike, x), ours)


def _linear(number: int, width: int) -> torch.nn.Linear:
    """One of `WIDTH` inputs, different for each number."""
    linear = torch.nn.Linear(WIDTH, width, device="meta")  # which draws no random numbers
    values = _random(number + 1, width, WIDTH + 1)[number]
    linear.weight, linear.bias = torch.nn.Parameter(values[:, 1:]), torch.nn.Parameter(values[:, 0])
    return linear
