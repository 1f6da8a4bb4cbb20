"""Measured bytes by part and by phase: what stands is counted, what comes and goes is the rest of what was held.

The parts that stand are those of the forecast, and are counted from their storages. The rest of what the device held at
its highest is the work of the phase: activations and workspace. On a card the allocator tells the highest; on the CPU
it is this process's resident memory, of which Python and the libraries held a share before the base was loaded.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from peft import PeftModel

from qtune import accelerator
from qtune.events import MemoryMeasured
from qtune.hardware import Device, host_memory, reset_peak, resident_bytes
from qtune.memory.memory_parts import STANDING_PARTS, standing_parts
from qtune.memory.memory_tracker import storage_sizes

if TYPE_CHECKING:
    from qtune.memory.engine import Engine

REST = "activations and workspace"
HOST = "held for the host"  # what a card would not hold, where the processor is the device
PARTS = ("python and libraries", "context", *STANDING_PARTS, HOST, REST)


@dataclass
class Ledger:
    """Measures one run. `outside_bytes` is what was held before the base came: libraries, or the CUDA context."""

    device: Device
    outside_bytes: int

    @classmethod
    def begin(cls, device: Device) -> "Ledger":
        """Call before the base is loaded."""
        if device.is_card:
            card = torch.device(device.name)
            free, total = accelerator.free_and_total_bytes(card)
            return cls(device, total - free - accelerator.reserved_bytes(card))
        return cls(device, resident_bytes()[0])

    def measure(
        self,
        phase: str,
        step: int,
        model: PeftModel,
        engine: "Engine | None" = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> MemoryMeasured:
        """Bytes by part at the highest point since the last measurement. Gradients count if they are there."""
        sizes: dict[str, int] = {}
        for part, side, tensors in standing_parts(model, engine, optimizer):
            name = part if side == "device" else HOST
            if side == "device" or not self.device.is_card:
                sizes[name] = sizes.get(name, 0) + storage_sizes(tensors)
        peak, total, free = self._held()
        outside = "context" if self.device.is_card else "python and libraries"
        sizes[REST] = max(0, peak - self.outside_bytes - sum(sizes.values()))
        sizes[outside] = self.outside_bytes
        reset_peak(self.device)
        names = [*PARTS, *sorted(sizes.keys() - set(PARTS))]
        parts = tuple((name, sizes[name]) for name in names if name == REST or sizes.get(name))
        return MemoryMeasured(step, parts, peak, total, free, phase)

    def _held(self) -> tuple[int, int, int]:
        """Peak, total and free bytes of the device; the peak includes what was held outside."""
        if self.device.is_card:
            card = torch.device(self.device.name)
            free, total = accelerator.free_and_total_bytes(card)
            return accelerator.most_allocated_bytes(card) + self.outside_bytes, total, free
        total, free = host_memory()
        return max(resident_bytes()), total, free
