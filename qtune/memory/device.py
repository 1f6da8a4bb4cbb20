"""The one device a run uses: a CUDA card where there is one, else this machine's processor and RAM."""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Device:
    """`name` is torch's (`cuda:0`, `cpu`), `label` a person's; bytes as they are at the time of asking."""

    name: str
    label: str
    total_bytes: int
    free_bytes: int
    compute_dtype: str

    @property
    def is_cuda(self) -> bool:
        return self.name.startswith("cuda")


def find_device() -> Device:
    """The first CUDA card, else the CPU. `compute_dtype` is the fastest this device has real arithmetic for."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info(0)
        has_bfloat16 = torch.cuda.get_device_capability(0) >= (8, 0)
        return Device("cuda:0", torch.cuda.get_device_name(0), total, free, "bfloat16" if has_bfloat16 else "float16")
    total, free = host_memory()
    return Device("cpu", f"CPU, {os.cpu_count()} cores", total, free, "bfloat16" if cpu_has_bfloat16() else "float32")


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
    if device.is_cuda:
        torch.cuda.reset_peak_memory_stats(0)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
