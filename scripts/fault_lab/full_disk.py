"""B4: a disk that fills up, at any byte, ends the run in one sentence, keeps what was there, and resume is exact.

Two disks, turn by turn: one on which no file may grow beyond a size (RLIMIT_FSIZE), byte by byte; and, where this
process may mount one, a small tmpfs with a given number of free pages.
"""

import os
import random
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from fault_lab.workshop import Ended, Workshop, difference, left_over

WHAT = "the disk fills up at a random byte, from a random step on"
DISK_BYTES = 256 * 1024**2
PAGE_BYTES = 4096
MOST_BYTES = 320 * 1024  # a checkpoint here takes 230 KiB
STEPS = 14


def run(cases: int, seed: int, folder: Path) -> Iterator[str | None]:
    disk = folder / "disk"
    disk.mkdir()
    mounted = _mount(disk)
    try:
        shop = Workshop.open(folder, seed)
        recipe = shop.recipe(train={"epochs": 2})
        shop.undisturbed(recipe)
        for case in range(cases):
            rng = random.Random(f"{seed} {case}")
            shop.clear("disk/full")
            on_tmpfs = mounted and case % 2 == 1
            yield _one(shop, recipe, disk, rng.randrange(STEPS), int(rng.random() ** 2 * MOST_BYTES), on_tmpfs)
    finally:
        if mounted:
            subprocess.run(["umount", str(disk)], check=True)


def _mount(disk: Path) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(disk)]
    return os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0


def _one(shop: Workshop, recipe: Path, disk: Path, step: int, size: int, on_tmpfs: bool) -> str | None:
    kind = f"{size // PAGE_BYTES} pages free" if on_tmpfs else f"no file over {size:,} bytes"
    told = f"{kind} from step {step} on"
    fill = (lambda: _fill(disk, size)) if on_tmpfs else (lambda: _limit(size))
    ended = shop.start(recipe, "disk/full", _after(step, fill)).wait()
    (disk / "ballast").unlink(missing_ok=True)
    fault = _fault_of_end(ended)
    if fault:
        return f"{told}: {fault}"
    again = shop.start(recipe, "disk/full").wait()
    if again.code != 0:
        return f"{told}: resumed with exit {again.code}, {again.last_line}"
    fault = difference(disk / "full", shop.folder / "undisturbed")
    left = left_over(disk / "full")
    return f"{told}: {fault or left}" if fault or left else None


def _fault_of_end(ended: Ended) -> str | None:
    if ended.code == 0:
        return None
    if ended.code != 1 or "Traceback" in ended.text or "fault is ours" in ended.text:
        return f"exit {ended.code}, {ended.last_line}"
    if "the disk is full" not in " ".join(ended.text.split()[-60:]):
        return f"it ended with {ended.last_line}"
    return None


def _after(step: int, fill: Callable[[], None]) -> Callable[[], None]:
    """In the child: fill the disk when `step` steps are done; 0 is before the first."""

    def prepare() -> None:
        from qtune.train.trainer import MeteredTrainer

        get_batches = MeteredTrainer.get_batch_samples

        def fill_and_get(self: MeteredTrainer, *args: object, **kwargs: object) -> object:
            if self.state.global_step == step:
                fill()
            return get_batches(self, *args, **kwargs)

        MeteredTrainer.get_batch_samples = fill_and_get  # type: ignore[method-assign]

    return prepare


def _fill(disk: Path, free_bytes: int) -> None:
    stat = os.statvfs(disk)
    with (disk / "ballast").open("wb") as file:
        os.posix_fallocate(
            file.fileno(), 0, max(1, stat.f_bavail * stat.f_frsize - free_bytes // PAGE_BYTES * PAGE_BYTES)
        )


def _limit(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
