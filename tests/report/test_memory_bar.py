import pytest

from qtune.events import MemoryMeasured
from qtune.report.memory_bar import (
    FILLS,
    FREE,
    OTHER,
    PEAK,
    UNKNOWN,
    heading,
    legend,
    other_bytes,
    peak,
    stacked,
    title,
)

GIB = 1024**3


def measured(parts: dict[str, float], peak: float, total: float, free: float) -> MemoryMeasured:
    sizes = tuple((name, int(size * GIB)) for name, size in parts.items())
    return MemoryMeasured(1, sizes, int(peak * GIB), int(total * GIB), int(free * GIB))


def test_the_bar_is_to_scale() -> None:
    memory = measured({"context": 0.5, "base": 4, "activations and workspace": 1.5}, peak=7, total=10, free=3)
    bar = stacked(memory, 100).plain
    assert bar == "╱" * 5 + "█" * 40 + "░" * 15 + "·" * 10 + PEAK + "·" * 19 + OTHER.char * 10


def test_every_known_part_is_told_apart_without_colour() -> None:
    chars = [fill.char for name, fill in FILLS.items() if name != "context"]  # a run has a context or Python, not both
    assert len({*chars, FREE.char, OTHER.char, UNKNOWN.char, PEAK}) == len(chars) + 4


def test_at_most_four_colours() -> None:
    colours = {fill.style for fill in (*FILLS.values(), UNKNOWN, OTHER, FREE)} | {"red"}
    assert colours - {"dim"} == {"cyan", "green", "yellow", "red"}


def test_without_a_card_it_is_called_what_it_is() -> None:
    assert title(measured({"python and libraries": 1, "base": 1}, 2, 8, 5)) == "host memory (this machine has no GPU)"
    assert title(measured({"context": 1, "base": 1}, 2, 8, 5)) == "device memory"
    assert heading(measured({"context": 1, "base": 1}, 2, 8, 5)) == "Device memory"


def test_the_legend_names_what_holds_something_in_the_order_of_the_bar() -> None:
    memory = measured({"context": 0.5, "base": 4, "gradients": 0, "mystery": 1.5}, peak=6, total=10, free=3)
    assert [(name, size) for _, name, size in legend(memory)] == [
        ("context", "512 MiB"),
        ("base", "4.0 GiB"),
        ("mystery", "1.5 GiB"),
        ("other", "1.0 GiB"),
        ("free", "3.0 GiB"),
    ]
    assert other_bytes(memory) == GIB


def test_a_device_that_is_nearly_full_is_red() -> None:
    assert "red" in str(peak(measured({"base": 7.9}, 7.9, 8, 0.1)).style)
    assert "red" not in str(peak(measured({"base": 4}, 4, 8, 4)).style)


@pytest.mark.parametrize("width", [0, 1, 7, 60])
@pytest.mark.parametrize(
    ("parts", "most", "total", "free"),
    [({}, 0, 0, 0), ({"base": 50}, 60, 8, 0), ({"base": 4}, 4, 8, 8), ({"base": -1}, -1, 8, -3)],
)
def test_figures_that_do_not_add_up_still_fill_the_bar(
    width: int, parts: dict[str, float], most: float, total: float, free: float
) -> None:
    assert stacked(measured(parts, most, total, free), width).cell_len == width
