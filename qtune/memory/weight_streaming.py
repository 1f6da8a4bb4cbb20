"""Frozen layers streamed from host memory: their weights visit the device for as long as they are used.

Held less of: the packed weights of the streamed layers; two buffers of one layer's size stand in for all of them.
Costs: the same bytes of host memory; a copy of each streamed layer in every forward and every backward pass, made
while the layer before it computes. Frozen weights never change, so nothing is copied back.
Refuses: models whose decoder layers cannot be found; layers that are not recomputed.

The adapter stays on the device. Streamed layers are spread evenly, so that a copy has as long as possible.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qtune import accelerator
from qtune.accelerator import Copy, CopyStream
from qtune.memory import memory_tracker

ALIGNMENT = 256  # bytes, which suits every dtype and CUDA kernel: cudaMalloc aligns to as much


@dataclass(frozen=True)
class Piece:
    """One tensor of a layer: where its bytes are in the layer's buffer, and how to put another in its place."""

    put: Callable[[torch.Tensor], None]
    shape: torch.Size
    dtype: torch.dtype
    start: int
    bytes: int

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        return buffer[self.start : self.start + self.bytes].view(self.dtype).view(self.shape)


@dataclass
class Slot:
    """A device buffer, the layer in it, and the copy by which it came."""

    buffer: torch.Tensor
    layer: int | None = None
    arriving: Copy | None = None


def frozen_tensors(layer: torch.nn.Module) -> Iterator[tuple[torch.Tensor, Callable[[torch.Tensor], None]]]:
    """Every tensor of the frozen parameters of `layer`, quantisation scales too, with a way to replace it.

    Norms and biases stay: they are small, and read by operations that cannot wait.
    """
    for parameter in layer.parameters():
        if parameter.requires_grad or (parameter.ndim < 2 and not hasattr(parameter, "quant_state")):
            continue
        yield parameter.data, _setter(parameter, "data")
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            yield state.absmax, _setter(state, "absmax")
            if state.state2 is not None:
                yield state.state2.absmax, _setter(state.state2, "absmax")


def _bring_codes(state: Any, device: torch.device) -> None:
    """The code books and the offset of a quantised weight, a kilobyte, stay on the device for all layers."""
    while state is not None:
        state.code = state.code.to(device)
        if state.offset is not None:
            state.offset = state.offset.to(device)
        state = state.state2


def layout(layer: torch.nn.Module) -> tuple[list[Piece], int]:
    """Where each frozen tensor of `layer` stands in a buffer of its own, and the bytes of that buffer."""
    pieces, end = [], 0
    for tensor, put in frozen_tensors(layer):
        start = -(-end // ALIGNMENT) * ALIGNMENT
        pieces.append(Piece(put, tensor.shape, tensor.dtype, start, tensor.nbytes))
        end = start + tensor.nbytes
    return pieces, end


def _setter(owner: Any, name: str) -> Callable[[torch.Tensor], None]:
    return lambda tensor: setattr(owner, name, tensor)


class LayerStream:
    """Holds the streamed layers' weights in host memory and brings them in, one ahead of the computation."""

    def __init__(self, layers: Sequence[torch.nn.Module], streamed: Sequence[int], device: torch.device):
        """Moves the frozen weights of `layers[i]`, for i in `streamed`, to host memory, if they are not there already.

        Their adapters, which peft makes where the weights are, go to `device`.
        """
        self.streamed, self._device = sorted(streamed), device
        self._pieces: dict[int, list[Piece]] = {}
        self._home: dict[int, torch.Tensor] = {}
        self._copies = CopyStream(device)
        for index in self.streamed:
            self._move_out(index, layers[index])
        self._slots: list[Slot] = []
        self._slot_bytes = max(home.numel() for home in self._home.values())

    @property
    def homes(self) -> list[torch.Tensor]:
        """The buffers in host memory."""
        return list(self._home.values())

    @property
    def slots(self) -> list[torch.Tensor]:
        """The buffers on the device."""
        return [slot.buffer for slot in self._slots]

    def bring_in(self, index: int, is_forward: bool, goes_round: bool = False) -> None:
        """Have layer `index`'s weights on the device, and start on those that are wanted next: after the last layer the
        first, where passes `goes_round`.
        """
        if index not in self._home:
            return
        slot = self._slot_of(index)
        if slot is None:
            slot = self._load(index, not_slot=None)
        assert slot.arriving is not None, "a layer is in a slot once its copy is under way"
        slot.arriving.wait()
        self._bind(index, slot.buffer)
        following = self._following(index, is_forward, goes_round)
        if following is not None and self._slot_of(following) is None:
            self._load(following, not_slot=slot)

    def _following(self, index: int, is_forward: bool, goes_round: bool) -> int | None:
        place = self.streamed.index(index) + (1 if is_forward else -1)
        if goes_round:
            place %= len(self.streamed)
        return self.streamed[place] if 0 <= place < len(self.streamed) else None

    def _slot_of(self, index: int) -> Slot | None:
        return next((slot for slot in self._slots if slot.layer == index), None)

    def _load(self, index: int, not_slot: Slot | None) -> Slot:
        """Start copying layer `index` into a slot other than `not_slot`; whoever was there goes home."""
        if len(self._slots) < min(2, len(self.streamed)):
            buffer = torch.empty(self._slot_bytes, dtype=torch.uint8, device=self._device)
            memory_tracker.mark([buffer], "streamed layers")
            self._slots.append(Slot(buffer))
            slot = self._slots[-1]
        else:
            slot = next(slot for slot in self._slots if slot is not not_slot)
        if slot.layer is not None:
            self._bind(slot.layer, self._home[slot.layer])
        home = self._home[index]
        target = slot.buffer[: home.numel()]
        slot.layer, slot.arriving = None, None  # should the copy fail, nobody is here
        slot.arriving = self._copies.copy(target, home)
        slot.layer = index
        return slot

    def _bind(self, index: int, buffer: torch.Tensor) -> None:
        for piece in self._pieces[index]:
            piece.put(piece.view(buffer))

    def _move_out(self, index: int, layer: torch.nn.Module) -> None:
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(self._device)
            _bring_codes(getattr(parameter, "quant_state", None), self._device)
        self._pieces[index], size = layout(layer)
        self._home[index] = home = accelerator.page_locked(size, torch.uint8)
        memory_tracker.mark([home], "streamed layers", "host")
        for piece, (tensor, put) in zip(self._pieces[index], list(frozen_tensors(layer)), strict=True):
            piece.view(home).copy_(tensor)
            put(piece.view(home))
