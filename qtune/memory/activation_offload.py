"""Layer inputs in page-locked host memory, copied beside the computation.

Held less of: the L inputs of (B, T, H) that recomputation keeps; two of them are on the device at a time.
Costs: 2BTH bytes a layer of host memory, which stay page-locked; on a card one copy out and one in for each layer, on a
stream of their own, behind a layer's arithmetic. The device's memory is given back in the order of its arithmetic,
so that what is held is what is counted.
Refuses: nothing; without a card the copies are plain ones.

Letters: B rows, T tokens, H hidden, L layers.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from qtune import accelerator
from qtune.accelerator import Copy, CopyStream
from qtune.memory import memory_tracker


@dataclass
class HostBuffers:
    """Inputs by layer. The buffers are kept from step to step and grow with the longest batch.

    `_kept` are the parts of them that hold an input, `_coming` inputs on their way back to the device.
    """

    _buffers: dict[int, torch.Tensor] = field(default_factory=dict)
    _kept: dict[int, torch.Tensor] = field(default_factory=dict)
    _coming: dict[int, tuple[torch.Tensor, Copy]] = field(default_factory=dict)
    _copies: CopyStream | None = None

    @contextlib.contextmanager
    def putting(self, index: int, hidden: torch.Tensor) -> Iterator[None]:
        """Copy layer `index`'s input out while the layer runs inside; behind that nobody need keep it."""
        place = self._buffer_for(index, hidden)[: hidden.numel()].view_as(hidden)
        self._kept[index] = place
        leaving = self._stream_of(hidden.device).copy(place, hidden)
        yield
        leaving.wait()

    def get(self, index: int, device: torch.device) -> torch.Tensor:
        """Layer `index`'s input on `device`; that of the layer before it is on its way when this returns."""
        tensor, arriving = self._coming.pop(index) if index in self._coming else self._fetch(index, device)
        arriving.wait()
        del self._kept[index]
        if index - 1 in self._kept and index - 1 not in self._coming:
            self._coming[index - 1] = self._fetch(index - 1, device)
        return tensor

    def forget(self) -> None:
        """Drop what a pass that did not come to its end has left."""
        self._kept.clear()
        self._coming.clear()

    def _buffer_for(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        buffer = self._buffers.get(index)
        if buffer is None or buffer.numel() < hidden.numel() or buffer.dtype != hidden.dtype:
            self._buffers[index] = buffer = accelerator.page_locked(hidden.numel(), hidden.dtype)
        memory_tracker.mark([buffer], "checkpoints", "host")  # a counter may be younger than the buffer
        return buffer

    def _fetch(self, index: int, device: torch.device) -> tuple[torch.Tensor, Copy]:
        tensor = torch.empty_like(self._kept[index], device=device)
        memory_tracker.mark([tensor], "checkpoints")
        return tensor, self._stream_of(device).copy(tensor, self._kept[index])

    def _stream_of(self, device: torch.device) -> CopyStream:
        if self._copies is None:
            self._copies = CopyStream(device)
        return self._copies
