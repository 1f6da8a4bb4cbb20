"""How much memory this machine has to give: its own, or what a container is allowed of it."""

import os
from pathlib import Path

import pytest
import torch
from made_driver import RTX_3060, RTX_4090, MadeCard, MadeDriver

from qtune import guest, hardware
from qtune.gpu_models import GpuModel, model_of
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
    assert hardware.imagined_card(GpuModel(8 * GIB), None, here).host_free_bytes == 20 * GIB
    card = hardware.imagined_card(GpuModel(8 * GIB), 3 * GIB, here)
    assert (card.free_bytes, card.host_free_bytes, card.is_card) == (8 * GIB, 3 * GIB, True)
    assert card.operations_per_second is None  # nobody knows how fast it is


@pytest.mark.parametrize(
    ("name", "capability", "dtype", "operations"),
    [("RTX 4090", (8, 9), "bfloat16", 82.5e12), ("T4", (7, 5), "float16", None), ("8GiB", (8, 0), "bfloat16", None)],
)
def test_a_card_that_is_named_is_planned_for_as_it_is(name, capability, dtype: str, operations: float | None) -> None:
    here = hardware.Device("cpu", "CPU", 24 * GIB, 20 * GIB, "float32", "a test", 20 * GIB)
    card = hardware.imagined_card(model_of(name), None, here)
    assert (card.capability, card.compute_dtype, card.operations_per_second) == (capability, dtype, operations)
    assert card.label == ("a card" if name == "8GiB" else name)


def test_a_cards_capability_is_its_own_or_the_oldest_with_its_arithmetic() -> None:
    here = hardware.Device("cpu", "CPU", 24 * GIB, 20 * GIB, "float32", "a test", 20 * GIB)
    assert here.capability is None
    assert hardware.imagined_card(GpuModel(8 * GIB), None, here).capability == (8, 0)
    assert hardware.Device("cuda:0", "T4", 8 * GIB, 8 * GIB, "float16").capability == (7, 0)
    assert hardware.Device("cuda:0", "RTX 4060", 8 * GIB, 8 * GIB, "bfloat16", capability=(8, 9)).capability == (8, 9)


@pytest.fixture
def two_cards(monkeypatch: pytest.MonkeyPatch) -> MadeDriver:
    """The larger one shows the desktop and has little left."""
    driver = MadeDriver([MadeCard(*RTX_4090, free=3 * GIB), MadeCard(*RTX_3060, free=11 * GIB, capability=(8, 6))])
    driver.install(monkeypatch)
    return driver


def test_of_two_cards_the_one_with_most_free_memory_is_taken_and_the_other_left_alone(two_cards: MadeDriver) -> None:
    device = hardware.find_device()
    assert (device.name, device.label, device.total_bytes) == ("cuda:1", RTX_3060[0], 12 * GIB)
    assert "most free memory of 2 cards" in device.why
    assert (device.capability, device.compute_dtype) == ((8, 6), "bfloat16")
    assert [card.has_context for card in two_cards.cards] == [False, True]


def test_a_run_may_take_its_budget_beside_what_the_process_holds_already(two_cards: MadeDriver) -> None:
    device = hardware.find_device()
    two_cards.cards[1].reserved = GIB
    hardware.prepare(device, 6 * GIB)
    allowed = 6 * GIB - device.outside_bytes + GIB
    assert two_cards.cards[1].fraction == pytest.approx(allowed / (12 * GIB))
    assert two_cards.cards[0].fraction == 1.0
    hardware.prepare(device)  # without a budget, what was free
    assert two_cards.cards[1].fraction == pytest.approx((device.free_bytes - device.outside_bytes + GIB) / (12 * GIB))
    hardware.prepare(device, 64 * GIB)
    assert two_cards.cards[1].fraction == 1.0


def test_a_process_of_somebody_else_has_its_cards_back(two_cards: MadeDriver) -> None:
    two_cards.is_initialised, two_cards.cards[1].fraction = True, 0.9
    has_cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    with guest.at_work():
        hardware.prepare(hardware.find_device(), 6 * GIB)
        assert two_cards.current == 1
        assert two_cards.cards[1].fraction < 0.6
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert two_cards.current == 0
    assert two_cards.cards[1].fraction == 0.9
    assert torch.backends.cuda.cudnn_sdp_enabled() == has_cudnn


def test_a_card_that_was_first_used_by_a_run_is_given_back_whole(two_cards: MadeDriver) -> None:
    with guest.at_work():
        hardware.prepare(hardware.find_device(), 6 * GIB)
    assert two_cards.is_initialised
    assert (two_cards.current, two_cards.cards[1].fraction) == (0, 1.0)
    assert not two_cards.cards[0].has_context
