"""A run's checkpoints: written whole, checked before they are read, pruned when newer ones are there.

checkpoints/step-00000120/
    adapter/               the adapter, a standard PEFT folder
    optimizer.safetensors  the optimizer's state, by trained weight
    random.safetensors     torch's random numbers; state.json has the others
    state.json             where the run stood: step, data position, schedule, log window, techniques
    lock.json              what the run stands on: hashes of base, data, tokenizer, template; recipe; versions
    SHA256SUMS             of all of these
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from qtune import atomic_files
from qtune.errors import RunFolderError
from qtune.memory.techniques import Techniques
from qtune.rundir import read_json

NAME = "step-{:08}"
ADAPTER, OPTIMIZER, RANDOM, STATE, LOCK = (
    "adapter",
    "optimizer.safetensors",
    "random.safetensors",
    "state.json",
    "lock.json",
)
FORMAT = 3
WARMED_FROM_NOUGHT = 2  # the format of checkpoints whose run took step k of n of its warm-up at (k - 1)/n of the peak


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint to go on from: its folder, what its state.json says, and of that the techniques it ran with."""

    path: Path
    values: dict[str, Any]
    techniques: Techniques

    @classmethod
    def read(cls, path: Path) -> "Checkpoint":
        """Raises RunFolderError for a checkpoint that another version of qtune wrote."""
        values = read_json(path / STATE)
        try:
            if values["format"] in (WARMED_FROM_NOUGHT, FORMAT):
                return cls(path, values, Techniques.planned(values["techniques"]))
        except (LookupError, TypeError):
            pass
        raise RunFolderError(f"{path}: was written by another version of qtune, which can go on from it.")

    @property
    def step(self) -> int:
        return int(self.values["step"])

    def warms_otherwise(self, warmup_steps: int) -> bool:
        """Whether the rates to come are not those of the run that wrote it."""
        return self.values["format"] == WARMED_FROM_NOUGHT and self.step < warmup_steps

    def rate_told(self, rate: float) -> str:
        """A sentence where the next step is taken at another learning `rate` than it would have been; of a checkpoint
        that does not say at which, nothing."""
        before = self.values.get("next_rate", rate)
        if before == rate:
            return ""
        return (
            f" Step {self.step + 1:,} is taken at a learning rate of {rate:.3g}, and as the run was it would have been"
            f" {before:.3g}: the schedule is laid anew over the steps that there are now."
        )

    def ran_out_of(self, patience: int | None) -> bool:
        """Whether training ended with it, as so many held-out losses in a row were no better than the best."""
        return patience is not None and self.values["reporter"].get("without_better", 0) >= patience

    @property
    def micro_batch(self) -> int:
        return int(self.values["micro_batch"])

    @property
    def journal_bytes(self) -> dict[str, int]:
        return dict(self.values["journal_bytes"])

    @property
    def train_seconds(self) -> float:
        return float(self.values["train_seconds"])

    def random(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The random numbers' generators: torch's as tensors, and Python's and numpy's."""
        return load_file(self.path / RANDOM), self.values["random"]


@dataclass(frozen=True)
class Broken:
    """A checkpoint that is not used, and why."""

    path: Path
    reason: str


def steps_in(folder: Path) -> list[tuple[int, Path]]:
    """Every checkpoint in `folder` by its step, whole or not, the newest first."""
    found = []
    for path in folder.glob("step-*"):
        digits = path.name.removeprefix("step-")
        if path.is_dir() and digits.isascii() and digits.isdigit():
            found.append((int(digits), path))
    return sorted(found, reverse=True)


def newest_whole(folder: Path) -> tuple[Path | None, list[Broken]]:
    """The newest checkpoint that is as it was written, and the newer ones that are not."""
    broken: list[Broken] = []
    for _, path in steps_in(folder):
        reason = atomic_files.what_is_broken(path)
        if reason is None:
            return path, broken
        broken.append(Broken(path, reason))
    return None, broken


def write(folder: Path, step: int, fill: Callable[[Path], None]) -> Path:
    """Have `fill` write a checkpoint's files, and put them, sealed, in place of any that is there for this step.

    Raises DiskFull; checkpoints that were there stay.
    """
    path = folder / NAME.format(step)
    with atomic_files.filled_in_place(path) as stage:
        fill(stage)
        atomic_files.seal(stage)
    return path


def prune(folder: Path, newest: Path, keep: int, best: Path | None) -> None:
    """Remove all but the `keep` newest checkpoints up to `newest`, and `best`.

    Those after `newest` are of a past that was resumed before them; leftovers of writes that were cut short go too.
    """
    steps = [path for _, path in steps_in(folder)]
    kept = {*steps[steps.index(newest) :][:keep], best}
    for path in steps:
        if path not in kept:
            atomic_files.remove(path)  # one that is removed half-way is no checkpoint that is broken
    for path in folder.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def choose(folder: Path) -> tuple[Path | None, str]:
    """The checkpoint to go on from, None for the beginning, and a sentence on why that one.

    Raises RunFolderError where there are checkpoints and none is whole.
    """
    path, broken = newest_whole(folder)
    told = " ".join(f"{each.path.name} is passed over: {each.reason}." for each in broken)
    if path is not None:
        return path, f"Going on from {path.name}, the newest whole checkpoint. {told}".rstrip()
    if broken:
        raise RunFolderError(f"{folder}: no checkpoint is whole. {told} Begin a new run with `qtune run`.")
    return None, "The run was stopped before its first checkpoint, so it begins again."
