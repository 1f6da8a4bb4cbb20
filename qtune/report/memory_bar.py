"""The memory of the device as one stacked bar: which part fills it with what, in every table and picture."""

from typing import NamedTuple

from rich.text import Text

from qtune.events import MemoryMeasured
from qtune.units import format_bytes

ON_THE_HOST = "python and libraries"


class Fill(NamedTuple):
    """How a part is drawn: told apart by character alone, by colour too where there is colour."""

    char: str
    style: str


FILLS = {
    ON_THE_HOST: Fill("╱", "dim"),
    "context": Fill("╱", "dim"),
    "base": Fill("█", "cyan"),
    "sharded layers": Fill("▙", "cyan"),
    "streamed layers": Fill("▌", "cyan"),
    "embedding": Fill("▆", "cyan"),
    "head": Fill("▇", "cyan"),
    "adapter": Fill("▓", "green"),
    "gradients": Fill("▚", "green"),
    "optimizer": Fill("▒", "green"),
    "paged optimizer": Fill("◫", "green"),
    "held for the host": Fill("▞", "dim"),
    "activations and workspace": Fill("░", "yellow"),
}
UNKNOWN = Fill("▤", "yellow")
OTHER = Fill("╌", "dim")
FREE = Fill("·", "dim")
PEAK = "┃"
NEARLY_FULL_FRACTION = 0.95


def name(memory: MemoryMeasured) -> str:
    """What the bar is of. Where Python itself is a part, the device is the machine's RAM."""
    return "host memory" if _is_on_the_host(memory) else "device memory"


def title(memory: MemoryMeasured) -> str:
    """`name`, and why it is the host's where it is."""
    return f"{name(memory)} (this machine has no GPU)" if _is_on_the_host(memory) else name(memory)


def _is_on_the_host(memory: MemoryMeasured) -> bool:
    return any(part == ON_THE_HOST for part, _ in memory.parts)


def heading(memory: MemoryMeasured) -> str:
    """`title`, at the beginning of a line."""
    text = title(memory)
    return text[0].upper() + text[1:]


def peak_of_total(memory: MemoryMeasured) -> str:
    """`4.9 GiB of 11 GiB`."""
    return f"{format_bytes(memory.peak_bytes)} of {format_bytes(memory.total_bytes)}"


def peak(memory: MemoryMeasured) -> Text:
    """`peak 4.9 GiB of 11 GiB`, red where hardly anything is left."""
    is_nearly_full = memory.peak_bytes > NEARLY_FULL_FRACTION * memory.total_bytes
    return Text(f"peak {peak_of_total(memory)}", "bold red" if is_nearly_full else "bold")


def stacked(memory: MemoryMeasured, width: int) -> Text:
    """The device as `width` cells: parts in order, a stroke at the peak, what is free, what others hold."""
    total = max(1, memory.total_bytes)
    cells: list[Fill] = []
    held = 0
    for name, size in memory.parts:
        held += max(0, size)
        cells += [FILLS.get(name, UNKNOWN)] * (_cells(held, total, width) - len(cells))
    others = [OTHER] * _cells(other_bytes(memory), total, width)
    cells += [FREE] * (width - len(others) - len(cells)) + others
    at = min(width - 1, _cells(memory.peak_bytes, total, width))
    text = Text()
    for place, fill in enumerate(cells[:width]):
        text.append(*((PEAK, "bold red") if place == at else fill))
    return text


def other_bytes(memory: MemoryMeasured) -> int:
    """Bytes that are neither free nor in a part: other programs, and what the allocator keeps for later."""
    held = sum(size for _, size in memory.parts)
    return max(0, memory.total_bytes - memory.free_bytes - held)


def parts(memory: MemoryMeasured) -> list[tuple[Fill, str, str]]:
    """(fill, name, bytes) of each part that holds anything."""
    return [(FILLS.get(name, UNKNOWN), name, format_bytes(size)) for name, size in memory.parts if size > 0]


def legend(memory: MemoryMeasured) -> list[tuple[Fill, str, str]]:
    """`parts`, then what others hold and what is free."""
    rows = parts(memory)
    others = other_bytes(memory)
    if others > 0.01 * memory.total_bytes:
        rows.append((OTHER, "other", format_bytes(others)))
    return [*rows, (FREE, "free", format_bytes(max(0, memory.free_bytes)))]


def _cells(size: int, total: int, width: int) -> int:
    return max(0, min(width, round(width * size / total)))
