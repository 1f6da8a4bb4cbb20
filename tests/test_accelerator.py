"""Page-locked memory: what is locked is unlocked, and a driver that refuses is said once."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qtune import accelerator
from qtune import run as runs
from qtune.events import Event, Notice
from qtune.rundir import RunDir


@dataclass
class Driver:
    """As much of CUDA's runtime as locks memory."""

    refuses: bool = False
    locked: set[int] = field(default_factory=set)
    errors: int = 0

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if self.refuses:
            self.errors += 1
            return 2
        self.locked.add(address)
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        if address not in self.locked:
            self.errors += 1
            return 713
        self.locked.remove(address)
        return 0

    def clear_error(self) -> None:
        self.errors = 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr(accelerator, "cards", list)
    monkeypatch.setattr(accelerator, "clear_error", driver.clear_error)
    return driver


def test_memory_is_locked_for_as_long_as_somebody_names_it(driver: Driver) -> None:
    buffer = accelerator.page_locked(1000, torch.float32)
    view = buffer[10:20].view(2, 5)
    assert driver.locked == {buffer.data_ptr()}
    del buffer
    assert len(driver.locked) == 1
    del view
    assert not driver.locked
    assert accelerator.page_locked(0, torch.uint8).numel() == 0
    assert not driver.locked


@pytest.mark.parametrize("act", [lambda driver: setattr(driver, "refuses", True), lambda driver: driver.locked.clear()])
def test_no_error_is_left_for_the_next_kernel(driver: Driver, act: Callable[[Driver], None]) -> None:
    """bitsandbytes ends the process at any error that is pending; unlocking what is not locked left one."""
    buffer = accelerator.page_locked(10, torch.float32)
    act(driver)
    assert accelerator.page_locked(10, torch.float32).shape == (10,)
    del buffer
    assert driver.errors == 0


def test_a_refusal_is_told_once_a_run(driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies that no longer overlap cost their whole time, and nobody knew why."""
    driver.refuses = True
    monkeypatch.setattr(runs, "_told", lambda *_: [accelerator.page_locked(10, torch.uint8) for _ in range(3)])
    heard: list[Event] = []
    folder = RunDir.create(tmp_path / "run", 'name = "t"\n', {})
    ready = SimpleNamespace(plan=SimpleNamespace(device=None))
    for _ in range(2):
        runs.run(ready, folder, heard.append)
        accelerator.page_locked(10, torch.uint8)  # outside of any run nobody listens
    assert heard == [Notice(runs.UNLOCKED)] * 2
    assert list(folder.events()) == [Notice(runs.UNLOCKED)]
    assert "page-lock" in runs.UNLOCKED
