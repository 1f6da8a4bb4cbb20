"""How much memory this machine has to give: its own, or what a container is allowed of it."""

import os
from pathlib import Path

import pytest

from qtune import hardware
from qtune.units import GIB

MEMINFO, LIMIT, USED = "/proc/meminfo", "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Of 64 GiB, 40 of them available; what else it says is given by file, and one that is not given is not there."""

    def with_files(**texts: str) -> None:
        said = {MEMINFO: f"MemTotal: {64 * GIB // 1024} kB\nMemAvailable:   {40 * GIB // 1024} kB\n"}
        said |= {{"limit": LIMIT, "used": USED}[name]: text for name, text in texts.items()}

        def read(path: Path, *arguments: object, **named: object) -> str:
            if str(path) not in said:
                raise FileNotFoundError(str(path))
            return said[str(path)]

        monkeypatch.setattr(hardware.Path, "read_text", read)
        pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 64 * GIB // 4096, "SC_AVPHYS_PAGES": 2 * GIB // 4096}
        monkeypatch.setattr(os, "sysconf", pages.__getitem__)

    return with_files


@pytest.mark.parametrize(
    ("files", "total", "available"),
    [
        ({}, 64, 40),  # no container
        ({"limit": "max\n", "used": f"{9 * GIB}\n"}, 64, 40),  # a container without a limit
        ({"limit": f"{16 * GIB}\n", "used": f"{9 * GIB}\n"}, 16, 7),
        ({"limit": f"{60 * GIB}\n", "used": f"{9 * GIB}\n"}, 60, 40),  # others of the machine have the rest
        ({"limit": f"{128 * GIB}\n", "used": f"{9 * GIB}\n"}, 64, 40),  # allowed more than there is
        ({"limit": "a lot", "used": "9"}, 64, 40),
    ],
)
def test_a_containers_limit_is_what_there_is_where_it_is_lower(machine, files, total, available) -> None:
    machine(**files)
    assert hardware.host_memory() == (total * GIB, available * GIB)


def test_a_card_is_imagined_in_this_host_or_in_one_of_its_own() -> None:
    here = hardware.Device("cpu", "CPU", 24 * GIB, 20 * GIB, "float32", "a test", 20 * GIB)
    assert hardware.imagined_card(8 * GIB, None, here).host_free_bytes == 20 * GIB
    card = hardware.imagined_card(8 * GIB, 3 * GIB, here)
    assert (card.free_bytes, card.host_free_bytes, card.is_card) == (8 * GIB, 3 * GIB, True)
    assert card.operations_per_second is None  # nobody knows how fast it is


def test_a_cards_capability_is_its_own_or_the_oldest_with_its_arithmetic() -> None:
    here = hardware.Device("cpu", "CPU", 24 * GIB, 20 * GIB, "float32", "a test", 20 * GIB)
    assert here.capability is None
    assert hardware.imagined_card(8 * GIB, None, here).capability == (8, 0)
    assert hardware.Device("cuda:0", "T4", 8 * GIB, 8 * GIB, "float16").capability == (7, 0)
    assert hardware.Device("cuda:0", "RTX 4060", 8 * GIB, 8 * GIB, "bfloat16", capability=(8, 9)).capability == (8, 9)
