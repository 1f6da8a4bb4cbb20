"""Live bytes by part, counted at every operation, on real tensors and on fake ones alike.

A dispatch mode sees each tensor that is born, a weak reference to its storage tells when it dies. Storages are counted
once, in the allocator's blocks of 512 bytes. The same counter measures a real step on the CPU and a fake one of the
forecast, so that the two can be compared part by part.

`mark` lets the techniques say what a tensor is and on which side it lives; without a counter it does nothing.
"""

import contextlib
import math
import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from qtune import accelerator
from qtune.accelerator import Capability

Side = Literal["device", "host"]
BLOCK_BYTES = 512
NO_KERNEL = {  # views, and memory that is not written
    *("view", "_unsafe_view", "t", "transpose", "slice", "expand", "unsqueeze", "squeeze", "detach", "alias", "select"),
    *("as_strided", "permute", "split", "split_with_sizes", "unbind", "_reshape_alias", "unfold", "lift_fresh"),
    *("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_local_scalar_dense"),
}
WRITES_ONLY = {"copy_", "fill_", "zero_", "zeros", "zeros_like", "new_zeros", "ones_like", "full_like", "new_full"}
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "_grouped_mm"}

_active: "LiveBytes | None" = None


@dataclass(frozen=True)
class Peak:
    """The highest point of a phase: bytes by part, and what was largest then."""

    device: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)

    @property
    def device_bytes(self) -> int:
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())


@dataclass
class _Held:
    """One live storage."""

    bytes: int
    part: str
    side: Side
    shape: tuple[int, ...]
    dtype: str
    born: str
    watch: Any = None


class LiveBytes(TorchDispatchMode):
    """Counts while it is entered. `peaks` holds one Peak a phase, `begun` what was held as each phase began last;
    `timeline` (device bytes by part) if asked for.

    With `with_places` every storage remembers the line of code that made it, which is slow. `card` says that the
    tensors are fake ones of the host, in place of those of a card of that capability.
    """

    def __init__(
        self,
        part_of_new: str = "layer workspace",
        with_timeline: bool = False,
        with_places: bool = False,
        card: Capability | None = None,
    ):
        super().__init__()
        self.phase = "load"
        self.card = card
        self.peaks: dict[str, Peak] = {}
        self.begun: dict[str, Peak] = {}
        self.layer_phases: dict[int, str] = {}
        self.timeline: list[tuple[str, dict[str, int]]] | None = [] if with_timeline else None
        self.largest: list[tuple[int, str, tuple[int, ...], str, str]] = []
        self._with_places = with_places
        self._part = part_of_new
        self._held: dict[int, _Held] = {}
        self._bytes: dict[Side, Counter[str]] = {"device": Counter(), "host": Counter()}
        self._total = {"device": 0, "host": 0}
        self._highest: dict[tuple[str, Side], int] = {}
        self._highest_ever = 0

    def __enter__(self) -> "LiveBytes":
        global _active
        assert _active is None, "one counter at a time"
        _active = self
        super().__enter__()
        return self

    def __exit__(self, *fault: Any) -> None:
        global _active
        _active = None
        super().__exit__(*fault)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return args[0].dtype is torch.bool or 1  # what a fake tensor cannot say is taken to be true, or 1
        result = func(*args, **(kwargs or {}))
        workspace = WORKSPACES.get(func._overloadpacket._qualified_op_name)
        if workspace is not None:
            self._note_workspace(*workspace(args))
        part = PARTS_BY_OPERATION.get(func._overloadpacket._qualified_op_name, self._part)
        for leaf in tree_iter(result):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf, part, "device")
        return result

    def count(self, tensors: Iterable[torch.Tensor], part: str, side: Side = "device") -> None:
        """Count `tensors` (or count them from now on) as `part`."""
        for tensor in tensors:
            held = self._see(tensor, part, side)
            if held is not None and (held.part, held.side) != (part, side):
                self._move(held, part, side)

    def enter_phase(self, phase: str) -> None:
        """What comes next belongs to `phase`; its peak starts from what is held now."""
        self.phase = phase
        self.begun[phase] = self.now()
        self._note_peak()

    def enter_layer_backward(self, layer: int) -> None:
        """What comes next is the backward pass of one decoder layer; `layer_phases` has the name of that phase."""
        self.layer_phases[layer] = f"backward {layer}"
        self.enter_phase(self.layer_phases[layer])

    @contextlib.contextmanager
    def part_of_new(self, part: str) -> Iterator[None]:
        """Tensors born inside are counted as `part`."""
        before, self._part = self._part, part
        try:
            yield
        finally:
            self._part = before

    def held(self, side: Side = "device") -> dict[str, int]:
        """Bytes by part, now."""
        return {part: size for part, size in self._bytes[side].items() if size}

    def now(self) -> Peak:
        """What is held at this moment, on both sides."""
        return Peak(self.held("device"), self.held("host"))

    def _see(self, tensor: torch.Tensor, part: str, side: Side) -> _Held | None:
        if tensor.layout != torch.strided or tensor.is_meta:
            return None
        storage = tensor.untyped_storage()
        known = self._held.get(id(storage))
        if known is not None and known.watch() is storage:
            return known
        size = block_bytes(storage.nbytes())
        place = _place() if self._with_places else ""
        held = _Held(size, part, side, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), place)
        key = id(storage)
        held.watch = weakref.ref(storage, lambda _: self._forget(key, held))
        self._held[key] = held
        self._add(held, size)
        return held

    def _forget(self, key: int, held: _Held) -> None:
        if self._held.get(key) is held:
            del self._held[key]
        self._add(held, -held.bytes)

    def _move(self, held: _Held, part: str, side: Side) -> None:
        self._add(held, -held.bytes)
        held.part, held.side = part, side
        self._add(held, held.bytes)

    def _add(self, held: _Held, size: int) -> None:
        self._bytes[held.side][held.part] += size
        self._total[held.side] += size
        if size > 0:
            self._note_peak()

    def _note_workspace(self, part: str, size: int) -> None:
        """Memory that a kernel takes and gives back within one call, unseen by a dispatch mode."""
        self._bytes["device"][part] += size
        self._total["device"] += size
        self._note_peak()
        self._bytes["device"][part] -= size
        self._total["device"] -= size

    def _note_peak(self) -> None:
        if self.timeline is not None:
            self.timeline.append((self.phase, self.held()))
        for side in ("device", "host"):
            if self._total[side] > self._highest.get((self.phase, side), -1):
                self._highest[self.phase, side] = self._total[side]
                earlier = self.peaks.get(self.phase, Peak())
                now = self.held(side)
                self.peaks[self.phase] = Peak(now, earlier.host) if side == "device" else Peak(earlier.device, now)
        if self._with_places and self._total["device"] > self._highest_ever:
            self._highest_ever = self._total["device"]
            largest = sorted(self._held.values(), key=lambda held: -held.bytes)[:20]
            self.largest = [(h.bytes, h.part, h.shape, h.dtype, h.born) for h in largest if h.side == "device"]


class MovedBytes(LiveBytes):
    """Counts as well, in `moved`, the bytes that layers read and write in both passes beside products and attention."""

    moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        name = func._overloadpacket.__name__
        is_in_layers = self.phase == "forward" or torch._C._current_graph_task_id() >= 0  # the loss's are its own
        if is_in_layers and name not in PRODUCTS and "scaled_dot_product" not in name:
            self.moved += moved_bytes(name, args, result)
        return result


def moved_bytes(name: str, args: Any, result: Any) -> int:
    """What the operation of that name reads of `args`, and writes to its result or to an argument in place: each tensor
    once, as what a cache holds is not known here."""
    made = [leaf for leaf in tree_iter(result) if isinstance(leaf, torch.Tensor)]
    if name in NO_KERNEL or not (made or name.startswith("_foreach")):  # which return nothing
        return 0
    given = [leaf for leaf in tree_iter(args) if isinstance(leaf, torch.Tensor)]
    if name.startswith("index_select"):
        return 2 * sum(map(_touched_bytes, made)) + _touched_bytes(given[-1])
    return sum(map(_touched_bytes, given[1:] if name in WRITES_ONLY else given)) + sum(map(_touched_bytes, made))


def _touched_bytes(tensor: torch.Tensor) -> int:
    """Of the elements that are there: an expanded one is read again from a cache."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * math.prod(size for size, stride in sizes if stride)


def block_bytes(size: int) -> int:
    """`size` in whole blocks of the allocator."""
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


def storage_sizes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes, in whole blocks, of the distinct storages behind `tensors`; views and ties count once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(block_bytes(size) for size in storages.values())


def quantization_state(parameters: Iterable[torch.nn.Parameter]) -> list[torch.Tensor]:
    """The scales and codes that bitsandbytes keeps beside its packed weights."""
    tensors = []
    for parameter in parameters:
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            tensors += [t for t in (state.absmax, state.code, state.offset) if isinstance(t, torch.Tensor)]
            state = state.state2
    return tensors


def mark(tensors: Iterable[torch.Tensor], part: str, side: Side = "device") -> None:
    """Tell the counter, if one is active, what these tensors are and where they would live beside a card."""
    if _active is not None:
        _active.count(tensors, part, side)


def enter_phase(phase: str) -> None:
    """Tell the counter, if one is active, which phase of the step begins."""
    if _active is not None:
        _active.enter_phase(phase)


def enter_layer_backward(layer: int) -> None:
    """Tell the counter, if one is active, that the backward pass of one decoder layer begins."""
    if _active is not None:
        _active.enter_layer_backward(layer)


def part_of_new(part: str) -> contextlib.AbstractContextManager[None]:
    """What is born inside belongs to `part`, if a counter is active."""
    return contextlib.nullcontext() if _active is None else _active.part_of_new(part)


def tiles(length: int, step: int, example: torch.Tensor) -> list[slice]:
    """Slices of `step` that cover `length`. Of fake tensors two and the last: the others would hold the same bytes."""
    every = [slice(start, min(length, start + step)) for start in range(0, length, step)]
    return every[:2] + every[-1:] if isinstance(example, FakeTensor) and len(every) > 3 else every


def stands_for_card() -> bool:
    """Whether what runs now is a forecast of what a CUDA card would hold."""
    return _active is not None and _active.card is not None


def capability_for(tensor: torch.Tensor) -> Capability | None:
    """Of the CUDA card that `tensor` lies on, or stands for in a forecast; None on any other device."""
    return _active.card if _active is not None and _active.card else accelerator.capability(tensor.device)


def note_workspace(part: str, size: int) -> None:
    """Count what a kernel takes inside one call, if a counter is active."""
    if _active is not None:
        _active._note_workspace(part, size)


def _dequantised_weight(args: Any) -> tuple[str, int]:
    """`gemm_4bit(A, B, (N, K), scales, block, ...)` on many rows writes the (N, K) weight in A's dtype, and its fp32
    block scales."""
    activations, (rows, columns) = args[0], args[2]
    card = capability_for(activations)
    if card is not None and activations.numel() // activations.shape[-1] <= fused_rows(
        card, (rows, columns), activations.dtype
    ):
        return "dequantised weights", 0
    return "dequantised weights", rows * columns * activations.element_size() + 2 * 4 * rows * columns // args[4]


# Up to how many rows bitsandbytes multiplies without writing the dequantised weight out, by capability, from so many
# waves on; a wave is a block of 64 outputs for each multiprocessor. Of bitsandbytes 0.50, backends/cuda/ops.py,
# `_gemm_4bit_use_custom_cuda`, exceptions rounded down. Others are as 8.9.
FUSED_ROWS: dict[Capability, tuple[tuple[float, int], ...]] = {
    (7, 5): ((0.5, 64), (0, 32)),
    (8, 0): ((3, 128), (1, 32)),
    (8, 6): ((1, 128), (0.5, 64), (0, 16)),
    (8, 7): (),
    (8, 9): ((3, 256), (2, 128), (0.8, 32), (0, 8)),
    (9, 0): ((3, 64), (2, 48), (1, 32)),
    (10, 0): ((3, 32),),
    (10, 3): ((3, 32),),
    (11, 0): (),
    (12, 0): ((3, 256), (2, 128), (0.8, 64), (0, 8)),
}
FUSED_ANYWHERE = 4  # rows, whatever the card and the weight
SMALL_WEIGHT = 4 << 20  # elements, below which more rows are fused on few cards
MOST_MULTIPROCESSORS = {  # of the cards that there are: on one with fewer, more rows are fused
    (7, 5): 72,
    (8, 0): 108,
    (8, 6): 84,
    (8, 9): 142,
    (9, 0): 132,
    (10, 0): 160,
    (10, 3): 160,
    (12, 0): 188,
}


def fused_rows(card: Capability, shape: tuple[int, int], dtype: torch.dtype) -> int:
    """Up to how many rows any card of that capability multiplies with a packed weight of that shape as it is."""
    has_kernel = dtype in (torch.float16, torch.bfloat16) and (card >= (8, 0) or dtype == torch.float16)
    if shape[0] * shape[1] < SMALL_WEIGHT or card < (7, 5) or not has_kernel:
        return FUSED_ANYWHERE
    waves = -(-shape[0] // 64) / MOST_MULTIPROCESSORS.get(card, max(MOST_MULTIPROCESSORS.values()))
    steps = FUSED_ROWS.get(card, FUSED_ROWS[8, 9])
    return next((rows for least, rows in steps if waves >= least), FUSED_ANYWHERE)


WORKSPACES: dict[str, Callable[[Any], tuple[str, int]]] = {"bitsandbytes::gemm_4bit": _dequantised_weight}
PARTS_BY_OPERATION = {"bitsandbytes::dequantize_4bit": "dequantised weights"}


def _place() -> str:
    """The innermost line outside torch that led here: `file.py:12 in forward`."""
    for frame in reversed(traceback.extract_stack(limit=40)):
        if "/torch/" not in frame.filename and "memory/memory_tracker.py" not in frame.filename:
            parts = frame.filename.rsplit("/", 2)
            return f"{'/'.join(parts[-2:])}:{frame.lineno} in {frame.name}"
    return ""
