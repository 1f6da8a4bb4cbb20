"""R10: a run on several ranks, of which one is killed or hangs, ends in time, says who it was, and goes on exactly."""

import os
import random
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from compare_losses import differ, events

from fault_lab.workshop import Child, Ended, Workshop, difference, left_over
from qtune.data import template_process
from qtune.rundir import RunDir

WHAT = "a rank of two or three killed, one in ten stopped, at a random time; one in five goes on with another number"
COUNTS = (2, 3)
HANGS = 0.1  # share of the cases in which the rank is stopped, not killed
ANOTHER_NUMBER = 5  # one case in so many goes on with another number of ranks
LIMIT_SECONDS = 10  # how long ranks wait for one, also for each other to begin
ENDS_WITHIN = 50.0  # the limit twice, as the launcher waits as long for a rank that hangs, and a slow machine
ROUNDING = 1e-5  # of losses of ranks in another number, whose sums are rounded elsewhere; 1e-6 was seen
EARLIER = 0.8  # a run that had ended before it was struck is struck anew, at this part of the time


@dataclass(frozen=True)
class Case:
    """What is done to whom, and when: `victim` is a rank of `count`; the run goes on on `then` ranks."""

    count: int
    victim: int
    number: signal.Signals
    at: float
    then: int

    def __str__(self) -> str:
        on = "as many" if self.then == self.count else f"{self.then}"
        return f"{self.number.name} to rank {self.victim} of {self.count} after {self.at:.3f} s, gone on with on {on}"


def run(cases: int, seed: int, folder: Path) -> Iterator[str | None]:
    os.environ["QTUNE_RANKS_LIMIT"] = f"{LIMIT_SECONDS}s"
    shop = Workshop.open(folder, seed)
    recipe = shop.recipe(
        counts=(1, *COUNTS),
        model={"compute_dtype": "float32"},
        lora={"rank": 64, "alpha": 64, "dropout": 0.0, "targets": ["q_proj", "o_proj"]},
        train={"epochs": 3, "gradient_accumulation": 4, "log_every": 1, "optimizer": "adamw"},
        evaluate={"general": "none"},
    )
    template_process._renderer.cache_clear()  # ranks that are forked would all talk to one process
    seconds = {count: _alone(shop, recipe, count) for count in (1, *COUNTS)}
    for number in range(cases):
        rng = random.Random(f"{seed} {number}")
        count = rng.choice(COUNTS)
        kind = signal.SIGSTOP if rng.random() < HANGS else signal.SIGKILL
        others = [other for other in (1, *COUNTS) if other != count]
        then = count if number % ANOTHER_NUMBER else rng.choice(others)
        case = Case(count, rng.randrange(count), kind, rng.random() * seconds[count], then)
        fault = _one(shop, recipe, case)
        yield None if fault is None else f"{case}: {fault}"


def _alone(shop: Workshop, recipe: Path, count: int) -> float:
    ended = _start(shop, recipe, f"alone-{count}", count).wait()
    if ended.code != 0:
        raise RuntimeError(f"an undisturbed run on {count} ranks ended with {ended.code}: {ended.text[-2000:]}")
    return ended.seconds


def _start(shop: Workshop, recipe: Path, name: str, count: int) -> Child:
    path = shop.folder / name
    words = ("resume", path) if RunDir(path).invocation.is_file() else ("run", recipe, "--output", path)
    return Child(*words, "--cards", str(count))


def _one(shop: Workshop, recipe: Path, case: Case) -> str | None:
    path = shop.folder / "killed"
    struck, at = None, case.at
    while struck is None:
        shop.clear("killed")
        child = _start(shop, recipe, "killed", case.count)
        struck, at = _struck(child, case, at), at * EARLIER
    ended = child.wait(struck - child.began + ENDS_WITHIN)
    fault = _ended_badly(ended, case)
    if fault is not None:
        return fault
    again = _start(shop, recipe, "killed", case.then).wait()
    if again.code != 0:
        return f"gone on with exit {again.code}: {again.text[-1500:]}"
    left = left_over(path)
    if left:
        return f"left over: {', '.join(left)}"
    alone = shop.folder / f"alone-{case.count}"
    return difference(path, alone) if case.then == case.count else _more_than_rounding(path, alone)


def _struck(child: Child, case: Case, at: float) -> float | None:
    """The time at which the rank was struck, `at` seconds from the beginning; None where it had ended before."""
    victim = _ranks(child, case.count)[case.victim]
    time.sleep(max(0.0, child.began + at - time.monotonic()))
    if not _lives(victim):
        child.wait()
        return None
    os.kill(victim, case.number)
    return time.monotonic()


def _ranks(child: Child, count: int) -> list[int]:
    """The processes of all ranks, as soon as they are there."""
    pids: list[str] = []
    while len(pids) < count:
        assert not child.has_ended(), "the launcher ended before there were ranks"
        pids = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text(encoding="ascii").split()
    return [int(pid) for pid in pids]


def _lives(pid: int) -> bool:
    """Whether the process runs: its launcher may not have seen yet that it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _ended_badly(ended: Ended, case: Case) -> str | None:
    if "hung for" in ended.text:
        return f"did not end within {ENDS_WITHIN:.0f} s: {ended.text[-1500:]}"
    if "Traceback" in ended.text or "fault is ours" in ended.text:
        return ended.text[-1500:]
    if ended.code != 0 and not re.search(rf"[Rr]ank {case.victim}\b", ended.text):
        return f"exit {ended.code}, and rank {case.victim} is not named: {ended.text[-1500:]}"
    return None


def _more_than_rounding(one: Path, other: Path) -> str | None:
    told, told_too = events(one), events(other)
    if len(told) != len(told_too):
        return f"{len(told)} events and {len(told_too)}"
    differing = [pair for pair in zip(told, told_too, strict=True) if differ(*pair, ROUNDING)]
    return f"more than rounding: {differing[0][0]} and {differing[0][1]}" if differing else None
