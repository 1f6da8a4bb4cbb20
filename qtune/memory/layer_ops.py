"""What a decoder layer does beside its linears and its attention, each as one operation that saves what it must.

Held less of: RMSNorm keeps its input as it came and one number a row, where the operations it is made of keep it twice
over in float32; a gated product (SwiGLU, GeGLU) keeps gate and up and not what the activation made of the gate; rotary
embedding keeps nothing.
Costs: nothing; the gated product is made again in the backward pass, beside its gradient. On a card each is one kernel
of Triton's, where that runs (`memory.triton_kernels`), else a few of torch's.
Refuses: norms whose weight is trained.

On the processor they are torch's operations in the order of transformers', in pieces that stay in its caches: forward
and backward the same bits, but for a norm's gradient, which is the same to rounding.

Letters: T rows, H width, B batch, N heads, D width of a head.
"""

import functools
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch

from qtune import accelerator
from qtune.memory import memory_tracker

Activation = Literal["silu", "gelu", "gelu_tanh"]
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu", "gelu_tanh")
PIECE_ELEMENTS = 2**18  # of a norm on the processor: 1 MiB in float32, which its caches hold
CARD_PIECE_ELEMENTS = 2**24  # of one on a card without Triton: 64 MiB in float32, of which a few are held; chosen

_library = torch.library.Library("qtune", "DEF")


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float, is_offset: bool) -> torch.Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last dimension H, which is that of `weight` (H,).

    `is_offset` says that 1 is added to the weight (Gemma), and the product made before it is rounded; else it is made
    of what is rounded already (Llama). The weight gets no gradient.
    """
    result: torch.Tensor = _RmsNorm.apply(x, weight, epsilon, is_offset)
    return result


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (B, N, T, D), its halves rotated against each other by angles whose `cos` and `sin` are (1 or B, T, D)."""
    result: torch.Tensor = _Rotary.apply(x, cos, sin)
    return result


def gated(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """activation(gate) * up, of tensors of the same shape."""
    result: torch.Tensor = _Gated.apply(gate, up, activation)
    return result


@dataclass(frozen=True)
class GatedProduct:
    """activation(gate) * up, not made yet: for a linear that keeps gate and up in its stead."""

    gate: torch.Tensor
    up: torch.Tensor
    activation: Activation

    def value(self) -> torch.Tensor:
        return gated(self.gate, self.up, self.activation)


def gated_value(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """`gated`, of which no gradient will be asked."""
    if _is_on_card(gate):
        result: torch.Tensor = torch.ops.qtune.gated(gate, up, activation)
        return result
    return _gated_by_torch(gate, up, activation)


def gated_gradients(
    gradient: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: Activation
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the product's `gradient` those of gate and up, and the product itself."""
    if _is_on_card(gate):
        of_gate, of_up, product = torch.ops.qtune.gated_backward(gradient, gate, up, activation)
        return of_gate, of_up, product
    return _gated_backward_by_torch(gradient, gate, up, activation)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float, is_offset: bool) -> torch.Tensor:
        run = torch.ops.qtune.rms_norm if _is_on_card(x) else _rms_norm_by_torch
        y, inverse = run(x, weight, epsilon, is_offset)
        ctx.save_for_backward(x, inverse, weight)
        ctx.is_offset = is_offset
        return y

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        x, inverse, weight = ctx.saved_tensors
        run = torch.ops.qtune.rms_norm_backward if _is_on_card(x) else _rms_norm_backward_by_torch
        return run(gradient, x, inverse, weight, ctx.is_offset), None, None, None


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, False)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(gradient, cos, sin, True), None, None


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, is_backward: bool) -> torch.Tensor:
    run = torch.ops.qtune.rotary if _is_on_card(x) else _rotary_by_torch
    result: torch.Tensor = run(x, cos, sin, is_backward)
    return result


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return gated_value(gate, up, activation)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        gate, up = ctx.saved_tensors
        of_gate, of_up, _ = gated_gradients(gradient, gate, up, ctx.activation)
        return of_gate, of_up, None


def _is_on_card(x: torch.Tensor) -> bool:
    return accelerator.is_card(x.device) or memory_tracker.stands_for_card()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _rms_norm_by_torch(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, is_offset: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm, and one over the root of each row's mean square (T, 1)."""
    rows = x.reshape(-1, x.shape[-1])
    y = torch.empty_like(rows)
    inverse = rows.new_empty(len(rows), 1, dtype=_wide(x.dtype))
    for piece in _pieces(rows):
        wide = rows[piece].to(inverse.dtype)
        inverse[piece] = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True).add_(epsilon))
        wide = wide * inverse[piece]
        y[piece] = wide * _one_more(weight, wide.dtype) if is_offset else weight * wide.to(x.dtype)
    return y.view(x.shape), inverse


def _rms_norm_backward_by_torch(
    gradient: torch.Tensor, x: torch.Tensor, inverse: torch.Tensor, weight: torch.Tensor, is_offset: bool
) -> torch.Tensor:
    """With g the gradient times the weight, and n the normalised row: (g - n mean(g n)) / root of the mean square."""
    rows, gradients = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, x.shape[-1])
    of_x = torch.empty_like(rows)
    for piece in _pieces(rows):
        normed = rows[piece].to(inverse.dtype) * inverse[piece]
        g = gradients[piece] * (_one_more(weight, inverse.dtype) if is_offset else weight)
        g = g.to(inverse.dtype)
        of_x[piece] = (g - normed.mul_((g * normed).mean(-1, keepdim=True))).mul_(inverse[piece])
    return of_x.view(x.shape)


def _one_more(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return weight.to(dtype) + 1.0


def _pieces(rows: torch.Tensor) -> list[slice]:
    """Slices of `rows` (T, H), each with what it takes in float32."""
    most = CARD_PIECE_ELEMENTS if accelerator.is_card(rows.device) else PIECE_ELEMENTS
    return memory_tracker.tiles(len(rows), max(1, most // rows.shape[1]), rows)


def _rotary_by_torch(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, is_backward: bool) -> torch.Tensor:
    half = x.shape[-1] // 2
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    y = x * cos
    first, second = y[..., :half], y[..., half:]
    if is_backward:  # the transposed rotation
        first.add_(x[..., half:] * sin[..., half:])
        second.sub_(x[..., :half] * sin[..., :half])
    else:
        first.sub_(x[..., half:] * sin[..., :half])
        second.add_(x[..., :half] * sin[..., half:])
    return y


def _activated(gate: torch.Tensor, activation: Activation) -> torch.Tensor:
    if activation == "silu":
        return torch.nn.functional.silu(gate)
    return torch.nn.functional.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")


def _gated_by_torch(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    return _activated(gate, activation).mul_(up)


def _gated_backward_by_torch(
    gradient: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: Activation
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    aten, activated, of_gate = torch.ops.aten, _activated(gate, activation), gradient * up
    product = activated * up
    if activation == "silu":
        aten.silu_backward.grad_input(of_gate, gate, grad_input=of_gate)
    else:
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        aten.gelu_backward.grad_input(of_gate, gate, approximate=approximate, grad_input=of_gate)
    return of_gate, activated.mul_(gradient), product


# ---- on a card


@functools.cache
def _kernels(device: torch.device) -> ModuleType | None:
    """Triton's kernels, where `device` is a card that runs them, and they agree with torch's; None where not."""
    if not accelerator.is_card(device):
        return None
    try:
        from qtune.memory import triton_kernels

        _compare(triton_kernels, device)
    except torch.OutOfMemoryError:  # says nothing of the kernels
        raise
    except Exception:  # a card too old, no compiler, no package: as many kinds as there are machines
        return None
    return triton_kernels


def _compare(kernels: Any, device: torch.device) -> None:
    """Raises AssertionError for a kernel that gives other values than torch's operations do."""
    draw = torch.Generator().manual_seed(0)
    x, up, gradient = torch.randn(3, 1, 2, 3, 8, generator=draw).to(device, torch.bfloat16)
    weight, cos, sin = x[0, 0, 0], up[:, 0], gradient[:, 0]
    close = functools.partial(torch.testing.assert_close, rtol=2e-2, atol=2e-2)  # both round to eight bits
    for is_offset in (False, True):
        y, inverse = _rms_norm_by_torch(x, weight, 1e-6, is_offset)
        close(kernels.rms_norm(x, weight, 1e-6, is_offset), (y, inverse))
        of_norm = (gradient, x, inverse, weight, is_offset)
        close(kernels.rms_norm_backward(*of_norm), _rms_norm_backward_by_torch(*of_norm))
    for is_backward in (False, True):
        close(kernels.rotary(x, cos, sin, is_backward), _rotary_by_torch(x, cos, sin, is_backward))
    for activation in ACTIVATIONS:
        close(kernels.gated(x, up, activation), _gated_by_torch(x, up, activation))
        of_product = (gradient, x, up, activation)
        close(kernels.gated_backward(*of_product), _gated_backward_by_torch(*of_product))


def _define(name: str, schema: str, by_torch: Any, fake: Any) -> None:
    """Make `torch.ops.qtune.NAME` one operation, which a counter sees as one: Triton's kernel, or `by_torch`."""

    def run(x: torch.Tensor, *others: Any) -> Any:
        kernels = _kernels(x.device) if x.numel() else None
        return by_torch(x, *others) if kernels is None else getattr(kernels, name)(x, *others)

    _library.define(f"{name}{schema}")
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qtune::{name}", fake, lib=_library)


def _fake_norm(x: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), x.new_empty(x.numel() // x.shape[-1], 1, dtype=_wide(x.dtype))


def _fake_gated_backward(gradient: torch.Tensor, gate: torch.Tensor, *others: Any) -> Any:
    return torch.empty_like(gate), torch.empty_like(gate), torch.empty_like(gate)


_define(
    "rms_norm",
    "(Tensor x, Tensor weight, float epsilon, bool is_offset) -> (Tensor, Tensor)",
    _rms_norm_by_torch,
    _fake_norm,
)
_define(
    "rms_norm_backward",
    "(Tensor gradient, Tensor x, Tensor inverse, Tensor weight, bool is_offset) -> Tensor",
    _rms_norm_backward_by_torch,
    lambda gradient, x, *others: torch.empty_like(x),
)
_define(
    "rotary",
    "(Tensor x, Tensor cos, Tensor sin, bool is_backward) -> Tensor",
    _rotary_by_torch,
    lambda x, *others: torch.empty_like(x),
)
_define(
    "gated", "(Tensor gate, Tensor up, str activation) -> Tensor", _gated_by_torch, lambda x, *_: torch.empty_like(x)
)
_define(
    "gated_backward",
    "(Tensor gradient, Tensor gate, Tensor up, str activation) -> (Tensor, Tensor, Tensor)",
    _gated_backward_by_torch,
    _fake_gated_backward,
)
