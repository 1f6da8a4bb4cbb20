"""Layer inputs in page-locked host memory, copied beside the computation.

Held less of: the L inputs of (B, T, H) that recomputation keeps; two of them are on the device at a time.
Costs: 2BTH bytes a layer of host memory, which stay page-locked; on a card one copy out and one in for each layer, on a
stream of their own, behind a layer's arithmetic.
Refuses: nothing; without a card the copies are plain ones.

Letters: B rows, T tokens, H hidden, L layers.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from qtune import accelerator
from qtune.accelerator import page_locked
from qtune.memory import memory_tracker


@dataclass
class _Kept:
    """One layer's input in host memory: its buffer, which may be larger, and the event after which it is there."""

    buffer: torch.Tensor
    is_there: Any = None


@dataclass
class HostBuffers:
    """Inputs by layer. The buffers are kept from step to step and grow with the longest batch."""

    _buffers: dict[int, torch.Tensor] = field(default_factory=dict)
    _kept: dict[int, _Kept] = field(default_factory=dict)
    _coming: dict[int, tuple[torch.Tensor, Any]] = field(default_factory=dict)
    _stream: Any = None

    def put(self, index: int, hidden: torch.Tensor) -> None:
        """Copy layer `index`'s input out; the caller need not keep it."""
        buffer = self._buffers.get(index)
        if buffer is None or buffer.numel() < hidden.numel() or buffer.dtype != hidden.dtype:
            self._buffers[index] = buffer = page_locked(hidden.numel(), hidden.dtype)
        memory_tracker.mark([buffer], "checkpoints", "host")  # a counter may be younger than the buffer
        place = buffer[: hidden.numel()].view_as(hidden)
        kept = self._kept[index] = _Kept(place)
        stream = self._copy_stream(hidden.device)
        stream.wait_stream(accelerator.current_stream(hidden.device))
        with accelerator.on_stream(stream, hidden.device):
            place.copy_(hidden, non_blocking=True)
            if accelerator.is_card(hidden.device):
                hidden.record_stream(stream)
            kept.is_there = stream.record_event()

    def get(self, index: int, device: torch.device) -> torch.Tensor:
        """Layer `index`'s input on `device`; that of the layer before it is on its way when this returns."""
        tensor, is_here = self._coming.pop(index) if index in self._coming else self._fetch(index, device)
        accelerator.current_stream(device).wait_event(is_here)
        del self._kept[index]
        if index - 1 in self._kept and index - 1 not in self._coming:
            self._coming[index - 1] = self._fetch(index - 1, device)
        return tensor

    def forget(self) -> None:
        """Drop what a pass that did not come to its end has left."""
        self._kept.clear()
        self._coming.clear()

    def _fetch(self, index: int, device: torch.device) -> tuple[torch.Tensor, Any]:
        kept = self._kept[index]
        tensor = torch.empty_like(kept.buffer, device=device)
        memory_tracker.mark([tensor], "checkpoints")
        stream = self._copy_stream(device)
        stream.wait_stream(accelerator.current_stream(device))  # the memory just given may still be in use there
        with accelerator.on_stream(stream, device):
            tensor.copy_(kept.buffer, non_blocking=True)
            return tensor, stream.record_event()

    def _copy_stream(self, device: torch.device) -> Any:
        if self._stream is None:
            self._stream = accelerator.new_stream(device)
        return self._stream
