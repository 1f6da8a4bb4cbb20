"""R2: killed at every single write, flush, rename and removal of a checkpoint, a run resumes from a whole one, exactly.

The child stops itself as a checkpoint begins; strace attaches, lets it go on, and kills it as it enters the system call
with the number wanted. Needs strace and the right to trace (ptrace).
"""

import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from fault_lab.workshop import Child, Workshop, difference, left_over
from qtune import atomic_files
from qtune.train import checkpoint_files

WHAT = "killed at every write, fsync and rename of a checkpoint; a case is one of them"
CALLS = ("openat", "write", "pwrite64", "fsync", "rename", "mkdir", "chmod", "unlinkat", "unlink", "rmdir", "ftruncate")
EVERY = 3


def run(cases: int, seed: int, folder: Path) -> Iterator[str | None]:
    """`cases` rounds of all the points there are, each with a base, rows and a checkpoint of its own."""
    if shutil.which("strace") is None:
        yield "strace is not installed"
        return
    for number in range(seed, seed + cases):
        (folder / str(number)).mkdir()
        yield from _round(Workshop.open(folder / str(number), number), EVERY * (2 + number % 3))


def _round(shop: Workshop, step: int) -> Iterator[str | None]:
    recipe = shop.recipe(train={"epochs": 2, "eval_every": 5}, save={"every": EVERY, "keep": 1})
    shop.undisturbed(recipe)
    calls, before = _trace(shop, recipe, step, None)
    counted = Counter(calls)
    for call in CALLS:
        for number in range(1, counted[call] + 1):
            yield _one(shop, recipe, (before, step), f"{call}:signal=KILL:when={number}")


def _stop_at(step: int, ends: bool) -> Callable[[], None]:
    """In the child: stop when the checkpoint of `step` is begun; end when it is done, where that `ends` it."""

    def prepare() -> None:
        from qtune.train.checkpointer import Saver

        save = Saver.save

        def stop_and_save(self: Saver) -> None:
            here = self._trainer.state.global_step == step
            if here:
                os.kill(os.getpid(), signal.SIGSTOP)
            save(self)
            if here and ends:
                os._exit(0)

        Saver.save = stop_and_save  # type: ignore[method-assign]

    return prepare


def _trace(shop: Workshop, recipe: Path, step: int, inject: str | None) -> tuple[list[str], int]:
    """Run until the checkpoint of `step`, trace it, and kill it at the call of `inject`.

    Returns the calls that were made, and the step of the newest checkpoint before it.
    """
    shop.clear("killed")
    child = shop.start(recipe, "killed", _stop_at(step, ends=True))
    _wait_until_stopped(child)
    before = checkpoint_files.steps_in(shop.folder / "killed" / "checkpoints")[0][0]
    told = shop.folder / "strace.txt"
    command = ["strace", "-f", "-o", str(told), "-e", f"trace={','.join(CALLS)}"]
    command += ["-e", f"inject={inject}"] if inject else []
    tracer = subprocess.Popen([*command, "-p", str(child.pid)], stderr=subprocess.PIPE, text=True)
    assert tracer.stderr is not None
    tracer.stderr.readline()  # `Process N attached`
    child.send(signal.SIGCONT)
    child.wait()
    tracer.wait()
    return re.findall(r"^\d+ +(\w+)\(", told.read_text(errors="replace"), re.MULTILINE), before


def _wait_until_stopped(child: Child) -> None:
    state = Path(f"/proc/{child.pid}/stat")
    while not child.has_ended() and state.read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.002)


def _one(shop: Workshop, recipe: Path, steps: tuple[int, int], inject: str) -> str | None:
    told = f"checkpoint of step {steps[1]}, {inject}"
    _trace(shop, recipe, steps[1], inject)
    checkpoints = shop.folder / "killed" / "checkpoints"
    found = checkpoint_files.steps_in(checkpoints)
    broken = [path.name for _, path in found if atomic_files.what_is_broken(path)]
    if broken or not found or found[0][0] not in steps:
        return f"{told}: found {[number for number, _ in found]}, broken {broken}"
    ended = shop.start(recipe, "killed").wait()
    if ended.code != 0:
        return f"{told}: resumed with exit {ended.code}, {ended.last_line}"
    if f"Going on from step-{found[0][0]:08}" not in " ".join(ended.text.split()):
        return f"{told}: the run did not say that it goes on from step {found[0][0]}"
    killed = shop.folder / "killed"
    fault = difference(killed, shop.folder / "undisturbed")
    return f"{told}: {fault or left_over(killed)}" if fault or left_over(killed) else None
