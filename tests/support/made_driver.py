"""Cards that are not there: what NVIDIA's driver, and torch's part of it, would answer about them."""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qtune import gpu_choice, hardware
from qtune.units import GIB, MIB


@dataclass
class MadeCard:
    """A card with `free` bytes left for a process that has nothing on it yet; a context takes `context` of them. With a
    `fault` no context can be made."""

    name: str
    total: int
    free: int
    capability: tuple[int, int] = (8, 9)
    mode: str = "Default"
    display: str = "Disabled"
    context: int = 400 * MIB
    reserved: int = 0
    has_context: bool = False
    fault: str = ""
    fraction: float = 1.0

    @property
    def left(self) -> int:
        return self.free - self.reserved - (self.context if self.has_context else 0)


RTX_4090 = ("NVIDIA GeForce RTX 4090", 24 * GIB)
RTX_3060 = ("NVIDIA GeForce RTX 3060", 12 * GIB)


@dataclass
class MadeDriver:
    """`cards` in CUDA's order; `nvidia-smi` has them the other way round, as it may."""

    cards: list[MadeCard]
    is_initialised: bool = False
    current: int = 0
    peaks_reset: list[int] = field(default_factory=list)

    def at(self, device: object = None) -> MadeCard:
        """The card, which has a context of ours from now on."""
        card = self.cards[self.index(device)]
        card.has_context = True
        return card

    def index(self, device: object) -> int:
        if device is None:
            return self.current
        return device if isinstance(device, int) else torch.device(device).index or 0

    def properties(self, device: object) -> SimpleNamespace:
        index = self.index(device)
        card = self.cards[index]
        major, minor = card.capability
        return SimpleNamespace(
            name=card.name,
            total_memory=card.total,
            major=major,
            minor=minor,
            uuid=uuid_of(index),
        )

    def csv(self) -> str:
        """What `nvidia-smi` would print."""
        rows = [
            f"GPU-{uuid_of(index)}, {card.name}, {card.total // MIB}, {card.left // MIB}, 580.95.05, {card.mode},"
            f" {card.display}"
            for index, card in enumerate(self.cards)
        ]
        return "\n".join(reversed(rows)) + "\n"

    def install_smi(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        """Put an `nvidia-smi` on the PATH that prints the cards as they are now."""
        program = folder / "nvidia-smi"
        program.write_text(f"#!/bin/sh\ncat <<'END'\n{self.csv()}END\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(folder), prepend=":")

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Have torch see the cards; products of matrices are left to the processor."""

        def note_fraction(fraction: float, device: object) -> None:
            self.at(device).fraction = fraction

        def product(index: int) -> None:
            if self.cards[index].fault:
                raise torch.AcceleratorError(self.cards[index].fault)
            self.at(index)

        answers = {
            "is_available": lambda: True,
            "is_initialized": lambda: self.is_initialised,
            "init": lambda: setattr(self, "is_initialised", True),
            "device_count": lambda: len(self.cards),
            "get_device_properties": self.properties,
            "get_arch_list": lambda: ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"],
            "mem_get_info": lambda device=None: (self.at(device).left, self.at(device).total),
            "memory_reserved": lambda device=None: self.at(device).reserved,
            "max_memory_allocated": lambda device=None: self.at(device).reserved,
            "max_memory_reserved": lambda device=None: self.at(device).reserved,
            "reset_peak_memory_stats": lambda device=None: self.peaks_reset.append(self.index(device)),
            "set_device": lambda device: setattr(self, "current", self.index(device)),
            "current_device": lambda: self.current,
            "set_per_process_memory_fraction": note_fraction,
            "get_per_process_memory_fraction": lambda device=None: self.at(device).fraction,
        }
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, answer)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(hardware, "first_product", product)
        monkeypatch.setattr(gpu_choice, "ask_driver", lambda: gpu_choice.cards_in(self.csv()))
        leave_as_it_was(gpu_choice.VISIBLE, monkeypatch)
        hardware.context_bytes.cache_clear()


def leave_as_it_was(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take a variable out of the environment, and after the test whatever the code sets it to: of one that was never
    set, `delenv` would remember nothing."""
    monkeypatch.setenv(variable, "")
    monkeypatch.delenv(variable)


def uuid_of(index: int) -> str:
    return f"{index}f3c0c3e-0000-4000-8000-00000000000{index}"
