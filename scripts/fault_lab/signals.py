"""R9: SIGTERM and SIGINT end a run after a whole step, with the exit code of the signal, and it goes on exactly."""

import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from fault_lab.workshop import Workshop, difference, left_over

WHAT = "SIGTERM and SIGINT at a random time, one in five twice"
TWICE = 0.2


def run(cases: int, seed: int, folder: Path) -> Iterator[str | None]:
    shop = Workshop.open(folder, seed)
    recipe = shop.recipe(train={"epochs": 3, "log_every": 2})
    seconds = shop.undisturbed(recipe).seconds
    for case in range(cases):
        rng = random.Random(f"{seed} {case}")
        number = (signal.SIGTERM, signal.SIGINT)[case % 2]
        shop.clear("stopped")
        yield _one(shop, recipe, number, rng.random() * seconds, rng.random() < TWICE)


def _one(shop: Workshop, recipe: Path, number: signal.Signals, at: float, twice: bool) -> str | None:
    told = f"{number.name} after {at:.3f} s{', twice' if twice else ''}"
    child = shop.start(recipe, "stopped")
    time.sleep(max(0.0, child.began + at - time.monotonic()))
    child.send(number)
    if twice:
        time.sleep(0.01)
        child.send(number)
    ended = child.wait()
    if ended.code not in (0, 128 + number, -number):  # -number: before qtune has begun to listen
        return f"{told}: exit {ended.code}, {ended.last_line}"
    if "Traceback" in ended.text or "fault is ours" in ended.text:
        return f"{told}: {ended.text[-500:]}"
    again = shop.start(recipe, "stopped").wait()
    if again.code != 0:
        return f"{told}: resumed with exit {again.code}, {again.last_line}"
    stopped = shop.folder / "stopped"
    fault = difference(stopped, shop.folder / "undisturbed")
    return f"{told}: {fault or left_over(stopped)}" if fault or left_over(stopped) else None
