"""Loops over weights, compiled for the processor at hand when they are first run: one pass where tensors take ten.

What they are given is made by `Tensor.numpy()`, which copies nothing. Python's lock is free while they run. The largest
of some sizes is found by their bits, which are ordered as floats without a sign are and put NaN on top, so that many
are compared at once.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, cast

import numpy as np
import torch
from bitsandbytes.functional import get_4bit_type
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bits = NDArray[np.unsignedinteger]
Bytes = NDArray[np.uint8]
Loop = TypeVar("Loop", bound=Callable[..., Any])

NF4 = get_4bit_type("nf4", device="cpu").numpy()  # 16 values, rising
BORDERS = (NF4[:-1] + NF4[1:]) / 2
HALF, ONE = np.float32(0.5), np.float32(1)


def compiled(loop: Loop, **options: Any) -> Loop:
    """`loop` in machine code, kept beside this file or in the user's cache where either can be written.

    Dividing by 0 gives infinity: asking first would keep numbers from being divided side by side.
    """
    compiler = partial(njit, nogil=True, error_model="numpy", **options)
    try:
        return cast(Loop, compiler(cache=True)(loop))
    except RuntimeError:  # nowhere to keep it
        return cast(Loop, compiler()(loop))


added_in_any_order = partial(compiled, fastmath={"reassoc", "nsz"})


@compiled
def through_nf4(blocks: Floats, inverse: Floats, scales: Floats, in_bfloat16: bool) -> Floats:
    """`blocks` (B, N), each multiplied by its `inverse`, rounded to NF4, and multiplied by its scale; then rounded to
    bfloat16, if so wanted."""
    restored = np.empty_like(blocks)
    for block in range(len(blocks)):
        for i in range(blocks.shape[1]):
            value = _nearest_nf4(blocks[block, i] * inverse[block]) * scales[block]
            restored[block, i] = _in_bfloat16(value) if in_bfloat16 else value
    return restored


@compiled
def _in_bfloat16(x: np.float32) -> np.float32:
    """The nearest, and between two the even one: 16 bits fewer. NaN stays NaN, as those of arithmetic end in 0s."""
    bits = _bits(x)
    return _float((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000)


@compiled
def _nearest_nf4(x: np.float32) -> np.float32:
    """What lies on a border takes the value below, as in bitsandbytes."""
    value = NF4[0]
    for i in range(len(BORDERS)):
        value = NF4[i + 1] if x > BORDERS[i] else value
    return value


@compiled
def in_steps(blocks: Floats, most: np.float32, room: int) -> tuple[Floats, Bytes]:
    """`blocks` (B, N) in steps of a scale each, of which its largest weight takes `most`; rounded half away from 0.

    The scales (B,), and a line of bytes (B, room + N) for each block, with `room` for its scale before the steps.
    """
    scales, content = np.empty(len(blocks), np.float32), np.empty((len(blocks), room + blocks.shape[1]), np.uint8)
    for block in range(len(blocks)):
        largest = np.uint32(0)
        for i in range(blocks.shape[1]):
            largest = max(largest, _bits(abs(blocks[block, i])))
        scale = _float(largest) / most
        inverse = ONE / scale if scale else np.float32(0)
        steps = content[block, room:]
        for i in range(len(steps)):
            x = blocks[block, i] * inverse
            steps[i] = np.int32(x + (HALF if x >= 0 else -HALF))
        scales[block] = scale
    return scales, content


@compiled
def from_steps(scales: Floats, content: Bytes, room: int) -> Floats:
    """What `in_steps` made, restored: (B, N)."""
    blocks = np.empty((len(content), content.shape[1] - room), np.float32)
    for block in range(len(content)):
        steps = content[block, room:]
        for i in range(len(steps)):
            blocks[block, i] = np.float32(np.int8(steps[i])) * scales[block]
    return blocks


def largest_sizes(blocks: torch.Tensor) -> torch.Tensor:
    """The largest size in each of `blocks` (B, N), in their own dtype of 2 or 4 bytes."""
    bits = blocks.view({2: torch.uint16, 4: torch.uint32}[blocks.itemsize]).numpy()
    sign = bits.dtype.type(1 << (8 * bits.itemsize - 1))
    return torch.from_numpy(_largest_bits(bits, sign)).view(blocks.dtype)


@compiled
def _largest_bits(blocks: Bits, sign: np.unsignedinteger) -> Bits:
    largest = np.empty(len(blocks), blocks.dtype)
    for block in range(len(blocks)):
        found = blocks[block, 0] & ~sign
        for i in range(blocks.shape[1]):
            found = max(found, blocks[block, i] & ~sign)
        largest[block] = found
    return largest


@compiled
def largest_error(found: Floats, wanted: Floats, relative: np.float32, absolute: np.float32) -> np.float32:
    """Of all of `found` (N,), over what each may be off: `relative` of the size of the one `wanted`, and `absolute`."""
    largest = np.uint32(0)
    for i in range(len(found)):
        largest = max(largest, _bits(abs(found[i] - wanted[i]) / (abs(wanted[i]) * relative + absolute)))
    return _float(largest)


@added_in_any_order
def squares(original: Floats, held: Floats, start: Floats, merged: Floats) -> tuple[np.float32, np.float32, np.float32]:
    """The sums of the squares of `original`, of `merged` - `start` and of `held` - `original`, all (N,)."""
    size = change = error = np.float32(0)
    for i in range(len(original)):
        size += original[i] * original[i]
        change += (merged[i] - start[i]) * (merged[i] - start[i])
        error += (held[i] - original[i]) * (held[i] - original[i])
    return size, change, error


@compiled
def _bits(x: np.float32) -> np.uint32:
    return np.float32(x).view(np.uint32)


@compiled
def _float(bits: np.uint32) -> np.float32:
    return np.uint32(bits).view(np.float32)
