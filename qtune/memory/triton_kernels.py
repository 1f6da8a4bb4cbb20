"""What `memory.layer_ops` does, a Triton kernel each: all is read once and written once, and is float32 between.

Needs the package `triton`, which torch brings along for its cards on Linux. Imported when a card first asks for it.
Tested in Triton's interpreter; not measured on a card.

Letters: T rows, H width, B batch, N heads, D width of a head.
"""

import torch
import triton
import triton.language as tl

GATED_BLOCK = 1024  # elements of one program; chosen, as triton's own tutorial on vector addition does
WARPS = ((8192, 16), (2048, 8), (0, 4))  # from so many elements of a row on; chosen, as triton's tutorial on layer norm


@triton.jit
def _rms_norm(x, weight, y, inverse, width, epsilon, is_offset: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    there = columns < width
    value = tl.load(x + row * width + columns, mask=there, other=0.0).to(tl.float32)
    scale = tl.load(weight + columns, mask=there, other=0.0)
    one_over = tl.rsqrt(tl.sum(value * value, axis=0) / width + epsilon)
    normed = value * one_over
    if is_offset:
        result = normed * (scale.to(tl.float32) + 1.0)
    else:
        result = normed.to(y.dtype.element_ty).to(tl.float32) * scale.to(tl.float32)
    tl.store(y + row * width + columns, result.to(y.dtype.element_ty), mask=there)
    tl.store(inverse + row, one_over)


@triton.jit
def _rms_norm_backward(gradient, x, inverse, weight, of_x, width, is_offset: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    there = columns < width
    one_over = tl.load(inverse + row)
    normed = tl.load(x + row * width + columns, mask=there, other=0.0).to(tl.float32) * one_over
    scale = tl.load(weight + columns, mask=there, other=0.0).to(tl.float32)
    if is_offset:
        scale += 1.0
    g = tl.load(gradient + row * width + columns, mask=there, other=0.0).to(tl.float32) * scale
    result = (g - normed * (tl.sum(g * normed, axis=0) / width)) * one_over
    tl.store(of_x + row * width + columns, result.to(of_x.dtype.element_ty), mask=there)


@triton.jit
def _rotary(
    x,
    cos,
    sin,
    y,
    x_batch,
    x_head,
    x_token,
    y_batch,
    y_head,
    y_token,
    angle_batch,
    tokens,
    heads,
    half,
    is_backward: tl.constexpr,
    head_block: tl.constexpr,
    half_block: tl.constexpr,
):
    batch, token = (tl.program_id(0) // tokens).to(tl.int64), (tl.program_id(0) % tokens).to(tl.int64)
    head, column = tl.arange(0, head_block)[:, None], tl.arange(0, half_block)[None, :]
    there = (head < heads) & (column < half)
    angles = batch * angle_batch + token * 2 * half + column
    cos_1 = tl.load(cos + angles, mask=column < half, other=0.0).to(tl.float32)
    cos_2 = tl.load(cos + angles + half, mask=column < half, other=0.0).to(tl.float32)
    sin_1 = tl.load(sin + angles, mask=column < half, other=0.0).to(tl.float32)
    sin_2 = tl.load(sin + angles + half, mask=column < half, other=0.0).to(tl.float32)
    given = x + batch * x_batch + token * x_token + head * x_head + column
    first = tl.load(given, mask=there, other=0.0).to(tl.float32)
    second = tl.load(given + half, mask=there, other=0.0).to(tl.float32)
    if is_backward:
        turned_1, turned_2 = first * cos_1 + second * sin_2, second * cos_2 - first * sin_1
    else:
        turned_1, turned_2 = first * cos_1 - second * sin_1, second * cos_2 + first * sin_2
    made = y + batch * y_batch + token * y_token + head * y_head + column
    tl.store(made, turned_1.to(y.dtype.element_ty), mask=there)
    tl.store(made + half, turned_2.to(y.dtype.element_ty), mask=there)


@triton.jit
def _activated(gate, activation: tl.constexpr):
    """activation(gate) and its slope."""
    if activation == "silu":
        s = tl.sigmoid(gate)
        value, slope = gate * s, s * (1.0 + gate * (1.0 - s))
    elif activation == "gelu":
        below = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
        value, slope = gate * below, below + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    else:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        t = 2.0 * tl.sigmoid(2.0 * inner) - 1.0
        value = 0.5 * gate * (1.0 + t)
        slope = 0.5 * (1.0 + t) + 0.5 * gate * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 0.134145 * gate * gate)
    return value, slope


@triton.jit
def _gated(gate, up, product, count, activation: tl.constexpr, block: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    there = place < count
    value, _ = _activated(tl.load(gate + place, mask=there, other=0.0).to(tl.float32), activation)
    factor = tl.load(up + place, mask=there, other=0.0).to(tl.float32)
    tl.store(product + place, (value * factor).to(product.dtype.element_ty), mask=there)


@triton.jit
def _gated_backward(gradient, gate, up, of_gate, of_up, product, count, activation: tl.constexpr, block: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    there = place < count
    value, slope = _activated(tl.load(gate + place, mask=there, other=0.0).to(tl.float32), activation)
    factor = tl.load(up + place, mask=there, other=0.0).to(tl.float32)
    g = tl.load(gradient + place, mask=there, other=0.0).to(tl.float32)
    tl.store(of_gate + place, (g * factor * slope).to(of_gate.dtype.element_ty), mask=there)
    tl.store(of_up + place, (g * value).to(of_up.dtype.element_ty), mask=there)
    tl.store(product + place, (value * factor).to(product.dtype.element_ty), mask=there)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, is_offset: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of x (..., H), and one over the root of each row's mean square (T, 1)."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y, inverse = torch.empty_like(rows), rows.new_empty(len(rows), 1, dtype=torch.float32)
    settings = {"is_offset": is_offset, **_for_a_row(rows.shape[1])}
    _rms_norm[(len(rows),)](rows, weight, y, inverse, rows.shape[1], epsilon, **settings)
    return y.view(x.shape), inverse


def rms_norm_backward(
    gradient: torch.Tensor, x: torch.Tensor, inverse: torch.Tensor, weight: torch.Tensor, is_offset: bool
) -> torch.Tensor:
    """The gradient of x (..., H)."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    of_x = torch.empty_like(rows)
    settings = {"is_offset": is_offset, **_for_a_row(rows.shape[1])}
    gradients = gradient.reshape(rows.shape).contiguous()
    _rms_norm_backward[(len(rows),)](gradients, rows, inverse, weight, of_x, rows.shape[1], **settings)
    return of_x.view(x.shape)


def _for_a_row(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"block": block, "num_warps": next(warps for least, warps in WARPS if block >= least)}


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, is_backward: bool) -> torch.Tensor:
    """x (B, N, T, D) rotated, laid out in memory as it is."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    y = torch.empty_like(x)
    batch, heads, tokens, width = x.shape
    cos, sin = cos.contiguous(), sin.contiguous()
    angle_batch = cos.stride(0) if len(cos) > 1 else 0
    strides = (*x.stride()[:3], *y.stride()[:3], angle_batch)
    blocks = {"head_block": triton.next_power_of_2(heads), "half_block": triton.next_power_of_2(width // 2)}
    _rotary[(batch * tokens,)](x, cos, sin, y, *strides, tokens, heads, width // 2, is_backward=is_backward, **blocks)
    return y


def gated(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """activation(gate) * up."""
    gate, up = gate.contiguous(), up.contiguous()
    product = torch.empty_like(gate)
    grid = (triton.cdiv(gate.numel(), GATED_BLOCK),)
    _gated[grid](gate, up, product, gate.numel(), activation=activation, block=GATED_BLOCK)
    return product


def gated_backward(
    gradient: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of gate and up, and the product."""
    gradient, gate, up = (tensor.contiguous() for tensor in (gradient, gate, up))
    made = (torch.empty_like(gate), torch.empty_like(gate), torch.empty_like(gate))
    grid = (triton.cdiv(gate.numel(), GATED_BLOCK),)
    _gated_backward[grid](gradient, gate, up, *made, gate.numel(), activation=activation, block=GATED_BLOCK)
    return made
