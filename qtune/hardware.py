"""The one device a run uses: a CUDA card where there is one, else this machine's processor and RAM."""

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qtune import accelerator, card_faults, gpu_choice
from qtune.accelerator import Capability
from qtune.units import MIB

if TYPE_CHECKING:
    from qtune.gpu_models import GpuModel

# Dense bfloat16 tensor operations a second with float32 sums, as the makers publish them, times what a fine-tune gets
# out of them. Longer names first: the first that is part of the card's name counts.
PUBLISHED_OPERATIONS = {
    "RTX 5090": 209e12,
    "RTX 5080": 112e12,
    "RTX 5070 Ti": 88e12,
    "RTX 5070": 62e12,
    "RTX 5060 Ti": 47e12,
    "RTX 4090": 165e12,
    "RTX 4080": 97e12,
    "RTX 4070 Ti": 80e12,
    "RTX 4070": 58e12,
    "RTX 4060 Ti": 44e12,
    "RTX 4060": 30e12,
    "RTX 3090": 71e12,
    "RTX 3080": 60e12,
    "RTX 3070": 41e12,
    "RTX 3060": 25e12,
    "RTX A6000": 155e12,
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
}
# Tensor cores multiply bfloat16 from here on, and float16 (CUDA programming guide, compute capabilities).
OLDEST_WITH: dict[str, Capability] = {"bfloat16": (8, 0), "float16": (7, 0), "float32": (7, 0)}
USED_FRACTION = 0.5  # chosen, not measured: dequantising, norms and copies take about as long as the products


@dataclass(frozen=True)
class Device:
    """`name` is torch's (`cuda:0`, `cpu`), `label` a person's, `why` the reason it was taken; bytes as they are now.

    `outside_bytes` is what a process holds on it besides tensors; `operations_per_second` what a card's arithmetic is
    worth in a fine-tune, and of the processor what it does in large products, None where that is not known.
    `capability` is a CUDA card's; where it is not said, that of the oldest card with such arithmetic.
    """

    name: str
    label: str
    total_bytes: int
    free_bytes: int
    compute_dtype: str
    why: str = ""
    host_free_bytes: int = 0
    outside_bytes: int = 0
    operations_per_second: float | None = None
    capability: Capability | None = None

    def __post_init__(self) -> None:
        if self.is_card and self.capability is None:
            object.__setattr__(self, "capability", OLDEST_WITH[self.compute_dtype])

    @property
    def is_card(self) -> bool:
        return accelerator.is_card(torch.device(self.name))


def find_device() -> Device:
    """The CUDA card with most free memory, else the CPU. `compute_dtype` is the fastest this device has real arithmetic
    for.

    Raises MachineError for a card that no run can use: too old for this torch, or taken, or its driver is.
    """
    host_total, host_free = host_memory()
    if _has_cards():
        return _roomiest_card(host_free)
    dtype = "bfloat16" if cpu_has_bfloat16() else "float32"
    label = f"CPU, {os.cpu_count()} cores"
    why = "torch sees no CUDA card"
    return Device("cpu", label, host_total, host_free, dtype, why, host_free, 0, _cpu_operations(dtype))


def _has_cards() -> bool:
    """Whether torch sees any. Where it sees none for a driver that is too old, it says so when it is started alone.

    Raises MachineError for that.
    """
    if torch.cuda.is_available():
        return True
    if torch.version.cuda is None or os.environ.get(gpu_choice.VISIBLE) == "":
        return False
    try:
        torch.cuda.init()
    except RuntimeError as fault:
        _refuse(fault, "The card", is_exclusive=False)
    return False


def _roomiest_card(host_free: int) -> Device:
    torch.cuda.init()
    seen = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    index, why = gpu_choice.chosen([str(each.uuid) for each in seen])
    card, capability = seen[index], (seen[index].major, seen[index].minor)
    card_faults.refuse_too_old(card.name, capability, torch.cuda.get_arch_list())
    try:
        begun = context_bytes(index, str(card.uuid))
        free, total = torch.cuda.mem_get_info(index)
    except RuntimeError as fault:
        as_told = gpu_choice.card_of(str(card.uuid))
        _refuse(fault, card.name, is_exclusive=as_told is not None and as_told.compute_mode != gpu_choice.SHARED)
        raise
    return Device(
        f"cuda:{index}",
        card.name,
        total,
        free + begun,  # this process's own context is part of the forecast
        "bfloat16" if capability >= OLDEST_WITH["bfloat16"] else "float16",
        why,
        host_free,
        begun + LATER_KERNEL_BYTES,
        published_operations(card.name),
        capability,
    )


def _refuse(fault: RuntimeError, label: str, is_exclusive: bool) -> None:
    refusal = card_faults.refusal(fault, label, is_exclusive)
    if refusal is not None:
        raise refusal from fault


def imagined_card(model: "GpuModel", host_bytes: int | None, here: Device) -> Device:
    """A card that is not in this machine, or not free, in a host with `host_bytes`."""
    has_bfloat16 = model.capability is None or model.capability >= OLDEST_WITH["bfloat16"]
    return Device(
        "cuda:0",
        model.name,
        model.bytes,
        model.bytes,
        "bfloat16" if has_bfloat16 else "float16",
        "--device-memory",
        host_bytes or here.host_free_bytes,
        ASSUMED_CONTEXT_BYTES,
        published_operations(model.name) or (here.operations_per_second if here.is_card else None),
        model.capability,
    )


_changed = contextlib.ExitStack()  # how what `prepare` did to this process is undone


def prepare(device: Device, most_bytes: int | None = None) -> Device:
    """Make this process ready to compute on `device`, of which it may take `most_bytes`; None is all that is free.
    Returns the device.

    The limit is torch's own, so that an overrun is seen where the driver would hide it: on Windows and WSL2 it goes on
    in the host's memory, many times slower. What is outside of torch's allocator is taken off. cuDNN's attention is
    turned off: it plans anew for each shape, and packs have new ones all the time.
    """
    _changed.callback(torch.backends.cuda.enable_cudnn_sdp, torch.backends.cuda.cudnn_sdp_enabled())
    torch.backends.cuda.enable_cudnn_sdp(False)
    if device.is_card:
        most = device.free_bytes if most_bytes is None else most_bytes
        card = torch.device(device.name)
        _changed.callback(accelerator.compute_on(card))
        _changed.callback(accelerator.hold_to(card, most - device.outside_bytes))
    return device


@contextlib.contextmanager
def as_it_was() -> Iterator[None]:
    """Afterwards the settings that `prepare` changes are those of before."""
    global _changed
    outer, _changed = _changed, contextlib.ExitStack()
    try:
        yield
    finally:
        _changed.close()
        _changed = outer


def with_host(device: Device, host_bytes: int | None) -> Device:
    """`device` in a host with `host_bytes` free; None leaves it as it is."""
    return device if host_bytes is None else replace(device, host_free_bytes=host_bytes)


ASSUMED_CONTEXT_BYTES = 500 * MIB  # CUDA context and kernels, of a whole run: 0.4 to 0.6 GiB on consumer cards
LATER_KERNEL_BYTES = 200 * MIB  # of that, kernels loaded when a run first uses them (lazy loading); not measured
LEAST_CONTEXT_BYTES = 50 * MIB  # what is less is not a context: it was there before


@lru_cache
def context_bytes(index: int, uuid: str) -> int:
    """What this process's CUDA context takes on that card, with the kernels of a first product of two matrices: what
    the driver has less of afterwards, but for the allocator's. Assumed where the driver does not tell, or the context
    was there before. Another process that takes memory at that moment is counted, too."""
    before = gpu_choice.card_of(uuid)
    first_product(index)
    after = gpu_choice.card_of(uuid)
    if before and after and before.free_bytes is not None and after.free_bytes is not None:
        own = before.free_bytes - after.free_bytes - torch.cuda.memory_reserved(index)
        if LEAST_CONTEXT_BYTES <= own <= 3 * ASSUMED_CONTEXT_BYTES:
            return own
    return ASSUMED_CONTEXT_BYTES - LATER_KERNEL_BYTES


def first_product(index: int) -> None:
    """Make this process's context on a card, and have it load cuBLAS."""
    square = torch.ones(64, 64, device=f"cuda:{index}", dtype=torch.float16)
    (square @ square).sum().item()


def published_operations(label: str) -> float | None:
    """What a card of this name does in a fine-tune; None for one whose maker's figure is not in the table."""
    rate = next((rate for name, rate in PUBLISHED_OPERATIONS.items() if name in label), None)
    return None if rate is None else USED_FRACTION * rate


@lru_cache(maxsize=2)
def _cpu_operations(dtype: str) -> float:
    """Of a product of two square matrices, the fastest of a few that are tried now."""
    square = torch.ones(768, 768, dtype=getattr(torch, dtype))
    square @ square
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        square @ square
        taken.append(time.perf_counter() - start)
    return 2 * 768**3 / min(taken)


def cpu_has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 itself (AVX-512 BF16 or AMX); emulated, it is slower than float32."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def host_memory() -> tuple[int, int]:
    """Total and available bytes of RAM; a container's limit counts as the total where it is lower."""
    page = os.sysconf("SC_PAGE_SIZE")
    total, available = os.sysconf("SC_PHYS_PAGES") * page, os.sysconf("SC_AVPHYS_PAGES") * page
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8").strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="utf-8"))
        if limit != "max" and int(limit) < total:
            total, available = int(limit), min(available, int(limit) - used)
    except (OSError, ValueError):
        pass
    return total, available


def resident_bytes() -> tuple[int, int]:
    """This process's resident memory now and at its highest, in bytes (`VmRSS` and `VmHWM` of proc(5))."""
    now = peak = 0
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS:"):
            now = int(line.split()[1]) * 1024
        elif line.startswith("VmHWM:"):
            peak = int(line.split()[1]) * 1024
    return now, peak


def reset_peak(device: Device) -> None:
    """Start a new peak; on Linux a process may reset its own `VmHWM` (proc(5), clear_refs)."""
    if device.is_card:
        accelerator.count_anew(torch.device(device.name))
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
