"""Frozen layers that are elsewhere: their weights visit the device for as long as they are used.

A layer's home is host memory, all of it, or of several ranks 1/N of its bytes at each, on the device or the host.

Held less of: the packed weights of such layers; two buffers of one layer's size stand in for all of them.
Costs: the bytes of the homes; a copy, and from parts an exchange between the ranks, of each such layer in every forward
and every backward pass, made while the layer before it computes. Frozen weights never change, so nothing goes back.
What NCCL takes of a card for its own buffers is outside of what is counted, and not measured on a card.
Refuses: models whose decoder layers cannot be found; layers that are not recomputed.

The adapter stays on the device. Such layers are spread evenly, so that a copy has as long as possible.

Letters: N ranks.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from qtune import accelerator
from qtune.accelerator import Copy, CopyStream
from qtune.distributed import agreement
from qtune.distributed.lockstep import Lockstep
from qtune.distributed.ranks import ALONE, Ranks
from qtune.memory import dealt_layers, memory_tracker
from qtune.memory.memory_tracker import Side
from qtune.memory.techniques import LiveModel, Techniques
from qtune.memory.techniques.weight_streaming import spread

ALIGNMENT = 256  # bytes, which suits every dtype and CUDA kernel: cudaMalloc aligns to as much
ABSENT_BYTES = 8  # the size of the largest dtype


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


class Home(Protocol):
    """Where a layer's bytes are while it does not compute."""

    @property
    def buffer(self) -> torch.Tensor:
        """What is held of them here."""
        ...

    @property
    def visit_bytes(self) -> int:
        """What the layer takes where it computes."""
        ...

    def put(self, pieces: Sequence[Piece]) -> None:
        """Have the layer's tensors be here, as far as they are."""
        ...

    def visit(self, copies: CopyStream, slot: torch.Tensor) -> Copy:
        """Start bringing the bytes to the first `visit_bytes` of `slot`."""
        ...


@dataclass(frozen=True)
class WholeHome:
    """All of them, in host memory."""

    buffer: torch.Tensor

    @property
    def visit_bytes(self) -> int:
        return self.buffer.numel()

    def put(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            piece.put(piece.view(self.buffer))

    def visit(self, copies: CopyStream, slot: torch.Tensor) -> Copy:
        return copies.copy(slot[: self.visit_bytes], self.buffer)


@dataclass(frozen=True)
class SharedHome:
    """This rank's of N equal parts, and behind it `ABSENT_BYTES` that are seen in place of the layer while it is away:
    no number in any kind of float."""

    buffer: torch.Tensor
    ranks: Ranks

    @classmethod
    def of(cls, part: torch.Tensor, ranks: Ranks, empty: torch.Tensor) -> "SharedHome":
        """`part` in `empty`, which has room for it."""
        empty[: part.numel()].copy_(part)
        empty[part.numel() :].fill_(255)
        return cls(empty, ranks)

    @property
    def part(self) -> torch.Tensor:
        return self.buffer[:-ABSENT_BYTES]

    @property
    def visit_bytes(self) -> int:
        return self.ranks.size * self.part.numel()

    def put(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            absent = self.buffer[-ABSENT_BYTES:].view(piece.dtype)[0]
            piece.put(absent.expand(piece.shape))

    def visit(self, copies: CopyStream, slot: torch.Tensor) -> Copy:
        whole, own = slot[: self.visit_bytes], part_of(self.ranks, self.part.numel())
        return copies.gather(whole, own, self.part, lambda: self.ranks.exchange_parts(whole))


def part_bytes(size: int, ranks: int) -> int:
    """Of a layer of `size` bytes in equal parts."""
    return -(-size // (ranks * ALIGNMENT)) * ALIGNMENT


def shared_bytes(size: int, ranks: int) -> int:
    """What each of them holds of such a layer."""
    return part_bytes(size, ranks) + ABSENT_BYTES


def part_of(ranks: Ranks, length: int) -> slice:
    """The place of this rank's part, of `length` bytes, in the whole."""
    return slice(ranks.rank * length, (ranks.rank + 1) * length)


class LayerStream:
    """Knows the homes of layers that are elsewhere, and brings them in, one ahead of the computation."""

    def __init__(self, layers: Sequence[torch.nn.Module], device: torch.device, ranks: Ranks = ALONE):
        """Of `layers`, which stay where they are until they `move_out`."""
        self.layers, self._device, self._ranks = layers, device, ranks
        self._pieces: dict[int, list[Piece]] = {}
        self._home: dict[int, Home] = {}
        self._side: dict[int, Side] = {}
        self._copies = CopyStream(device)
        self._slots: list[Slot] = []
        self.lockstep: Lockstep | None = None
        self._slot_bytes = 0

    @property
    def streamed(self) -> list[int]:
        """Which layers have a home elsewhere."""
        return sorted(self._home)

    def homes(self, side: Side) -> list[torch.Tensor]:
        """What is held there of the layers that are elsewhere."""
        return [home.buffer for index, home in self._home.items() if self._side[index] == side]

    @property
    def slots(self) -> list[torch.Tensor]:
        """The buffers on the device."""
        return [slot.buffer for slot in self._slots]

    def come_to(self, index: int, is_forward: bool, trains: bool) -> None:
        """Have layer `index`'s weights on the device, for a pass that has come to it; one that `trains` has a backward
        pass, too. Where ranks have parts, all of them do. Raises RankLost.
        """
        if index not in self._home:
            return
        if self.lockstep is not None:
            self.lockstep.come_to(index, is_forward, trains)
        else:
            self.bring_in(index, is_forward, goes_round=is_forward and not trains)

    def bring_in(self, index: int, is_forward: bool, goes_round: bool) -> None:
        """Have them there, and start on those that are wanted next: after the last layer the first, where passes
        `goes_round`.
        """
        slot = self._slot_of(index)
        if slot is None:
            slot = self._load(index, not_slot=None)
        assert slot.arriving is not None, "a layer is in a slot once its copy is under way"
        slot.arriving.wait()
        for piece in self._pieces[index]:
            piece.put(piece.view(slot.buffer))
        following = self._following(index, is_forward, goes_round)
        if following is not None and self._slot_of(following) is None:
            self._load(following, not_slot=slot)

    def _following(self, index: int, is_forward: bool, goes_round: bool) -> int | None:
        streamed = self.streamed
        place = streamed.index(index) + (1 if is_forward else -1)
        if goes_round:
            place %= len(streamed)
        return streamed[place] if 0 <= place < len(streamed) else None

    def _slot_of(self, index: int) -> Slot | None:
        return next((slot for slot in self._slots if slot.layer == index), None)

    def _load(self, index: int, not_slot: Slot | None) -> Slot:
        """Start bringing layer `index` into a slot other than `not_slot`; whoever was there goes home."""
        slot = next(slot for slot in self._slots if slot is not not_slot)
        if slot.layer is not None:
            self._go_home(slot.layer)
        slot.layer, slot.arriving = None, None  # should the copy fail, nobody is here
        slot.arriving = self._home[index].visit(self._copies, slot.buffer)
        slot.layer = index
        return slot

    def _go_home(self, index: int) -> None:
        self._home[index].put(self._pieces[index])

    def move_out(self, on_host: Collection[int], in_parts: Collection[int] = ()) -> None:
        """Have the homes of layers `on_host`, `in_parts`, or both, whether they were somewhere else before or not.

        Their adapters, which peft makes where the weights are, go to the device. Of one rank a part is the whole, and
        on the host.
        """
        self._empty_slots()
        if self._ranks.size == 1:
            on_host, in_parts = {*on_host, *in_parts}, ()
        if in_parts:
            told = {"layers elsewhere": sorted({*on_host, *in_parts}), "layers in parts": sorted(in_parts)}
            agreement.refuse_unlike(self._ranks, told)
        for index in sorted({*on_host, *in_parts}):
            self._home[index] = home = self._new_home(index, index in on_host, index in in_parts)
            side: Side = "host" if index in on_host else "device"
            self._side[index] = side
            memory_tracker.mark([home.buffer], "streamed layers" if side == "host" else "sharded layers", side)
            self._go_home(index)
        size = max(home.visit_bytes for home in self._home.values())
        for _ in range(min(2, len(self._home))):
            self._slots.append(Slot(torch.empty(size, dtype=torch.uint8, device=self._device)))
        memory_tracker.mark(self.slots, "streamed layers")
        if in_parts:
            self.lockstep = self.lockstep or Lockstep(self._ranks, self.bring_in)
            self.lockstep.go_through(self.streamed)

    def _empty_slots(self) -> None:
        for slot in self._slots:
            if slot.layer is not None:
                self._go_home(slot.layer)
        self._slots.clear()

    def _new_home(self, index: int, on_host: bool, in_parts: bool) -> Home:
        before = self._home.get(index)
        if before is None:
            self._look_at(index)
        size = sum(layout(self.layers[index])[1:])
        if not in_parts:
            return before or WholeHome(self._packed(index, accelerator.page_locked(size, torch.uint8)))
        length = part_bytes(size, self._ranks.size)
        owner = dealt_layers.owner_of(self.layers[index])

        def packed() -> torch.Tensor:
            return self._packed(index, torch.zeros(self._ranks.size * length, dtype=torch.uint8))

        if isinstance(before, SharedHome):
            part = before.part
        elif owner is not None:
            part = dealt_layers.deal(self.layers[index], self._ranks, owner, packed, length)
        else:
            part = packed()[part_of(self._ranks, length)]
        room = shared_bytes(size, self._ranks.size)
        if on_host:
            return SharedHome.of(part, self._ranks, accelerator.page_locked(room, torch.uint8))
        return SharedHome.of(part, self._ranks, torch.empty(room, dtype=torch.uint8, device=self._device))

    def _look_at(self, index: int) -> None:
        """Where the tensors of a layer are that has been where it computes."""
        for parameter in self.layers[index].parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(self._device)
            _bring_codes(getattr(parameter, "quant_state", None), self._device)
        self._pieces[index] = layout(self.layers[index])[0]

    def _packed(self, index: int, buffer: torch.Tensor) -> torch.Tensor:
        """`buffer`, with the layer's tensors in it."""
        for piece, (tensor, _) in zip(self._pieces[index], frozen_tensors(self.layers[index]), strict=True):
            piece.view(buffer).copy_(tensor)
        return buffer


def move_out(live: LiveModel, techniques: Techniques) -> None:
    """Have the homes of a live model's layers where `techniques` say, and have it bring them in.

    Raises MachineError where ranks with parts of them would not bring in the same.
    """
    on_host, in_parts = (
        spread(count, len(live.layers)) for count in (techniques.streamed_layers, techniques.sharded_layers)
    )
    if live.runner.stream is None:
        live.runner.stream_with(LayerStream(live.layers, live.device, live.ranks))
    live.runner.stream.move_out(on_host, in_parts)
    if live.runner.stream.lockstep is not None:
        live.runner.stream.lockstep.rule(live.causal)
