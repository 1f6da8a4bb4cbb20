"""Measured bytes by part: what the base, the adapter, its gradients and the optimizer hold, and what is left over.

The four tensor parts are counted exactly from their storages. The rest of what the device holds is the work of a
step: activations and workspace. On a card the allocator tells the total; on the CPU it is this process's resident
memory, of which Python and the libraries held a share before the base was loaded.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from qtune.events import MemoryMeasured
from qtune.memory.device import Device, host_memory, resident_bytes

PARTS = (
    "python and libraries",
    "context",
    "base",
    "adapter",
    "gradients",
    "optimizer",
    "activations and workspace",
)


@dataclass
class Ledger:
    """Measures one run. `outside_bytes` is what was held before the base came: libraries, or the CUDA context."""

    device: Device
    outside_bytes: int

    @classmethod
    def begin(cls, device: Device) -> "Ledger":
        """Call before the base is loaded."""
        if device.is_cuda:
            free, total = torch.cuda.mem_get_info(0)
            return cls(device, total - free - torch.cuda.memory_reserved(0))
        return cls(device, resident_bytes()[0])

    def measure(self, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None) -> MemoryMeasured:
        """Bytes by part at the highest point so far. Call between backward and the zeroing of gradients."""
        trainable = [p for p in model.parameters() if p.requires_grad]
        frozen = [p for p in model.parameters() if not p.requires_grad]
        tensors = {
            "base": storage_bytes([*frozen, *quantization_state(frozen), *model.buffers()]),
            "adapter": storage_bytes(trainable),
            "gradients": storage_bytes(p.grad for p in trainable if p.grad is not None),
            "optimizer": storage_bytes(optimizer_state(optimizer)) if optimizer else 0,
        }
        peak, total, free = self._held()
        outside = "context" if self.device.is_cuda else "python and libraries"
        rest = peak - self.outside_bytes - sum(tensors.values())
        sizes = {outside: self.outside_bytes, **tensors, "activations and workspace": max(0, rest)}
        parts = tuple((name, sizes[name]) for name in PARTS if name in sizes)
        return MemoryMeasured(step, parts, peak, total, free)

    def _held(self) -> tuple[int, int, int]:
        """Peak, total and free bytes of the device; the peak includes what was held outside."""
        if self.device.is_cuda:
            free, total = torch.cuda.mem_get_info(0)
            return torch.cuda.max_memory_allocated(0) + self.outside_bytes, total, free
        total, free = host_memory()
        return max(resident_bytes()), total, free


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the distinct storages behind `tensors`; views and ties count once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def quantization_state(parameters: Iterable[torch.nn.Parameter]) -> list[torch.Tensor]:
    """The scales bitsandbytes keeps beside its packed weights."""
    found = []
    for parameter in parameters:
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            found += [t for t in (state.absmax, state.code, state.offset) if isinstance(t, torch.Tensor)]
            state = state.state2
    return found


def optimizer_state(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Every tensor of the optimizer's state, accelerate's wrapper looked through."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return [t for state in inner.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
