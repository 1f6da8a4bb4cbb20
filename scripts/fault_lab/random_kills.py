"""R1: a run that is killed and resumed is, to the bit, the run that was left alone."""

import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from fault_lab.workshop import Workshop, difference, left_over

WHAT = "kill -9 at a random time, and again while it resumes"
KINDS = {
    "packed": {"train": {"epochs": 3, "log_every": 2}},
    "padded": {"data": {"packing": False, "held_out_fraction": 0.7}, "train": {"optimizer": "adamw", "epochs": 2}},
    "whole": {"model": {"quantization": "none"}, "train": {"optimizer": "adamw_8bit", "epochs": 3}},
}
AGAIN = 0.3  # share of the cases in which the run that goes on is killed, too


def run(cases: int, seed: int, folder: Path) -> Iterator[str | None]:
    shop = Workshop.open(folder, seed)
    recipes = {kind: shop.recipe(kind, **settings) for kind, settings in KINDS.items()}
    seconds = {kind: shop.undisturbed(recipe, f"{kind}-alone").seconds for kind, recipe in recipes.items()}
    for case in range(cases):
        rng = random.Random(f"{seed} {case}")
        kind = rng.choice(sorted(KINDS))
        shop.clear("killed")
        kills = [rng.random() * seconds[kind]]
        if rng.random() < AGAIN:
            kills.append(rng.random() * seconds[kind])
        yield _one(shop, recipes[kind], folder / f"{kind}-alone", kills)


def _one(shop: Workshop, recipe: Path, alone: Path, kills: list[float]) -> str | None:
    told = f"{recipe.stem}, killed after {' and '.join(f'{at:.3f} s' for at in kills)}"
    for at in kills:
        child = shop.start(recipe, "killed")
        time.sleep(max(0.0, child.began + at - time.monotonic()))
        child.send(signal.SIGKILL)
        ended = child.wait()
        if ended.code not in (0, -signal.SIGKILL):
            return f"{told}: exit {ended.code}, {ended.last_line}"
    ended = shop.start(recipe, "killed").wait()
    if ended.code != 0:
        return f"{told}: resumed with exit {ended.code}, {ended.last_line}"
    fault = difference(shop.folder / "killed", alone)
    left = left_over(shop.folder / "killed")
    if left:
        fault = fault or f"left over: {', '.join(left)}"
    return None if fault is None else f"{told}: {fault}"
