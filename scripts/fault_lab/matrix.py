"""R7: going on is exact for every way to train, from the middle of an epoch and from its end."""

import itertools
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fault_lab.workshop import Workshop, difference
from qtune.train import checkpoint_files

WHAT = "quantisation x optimizer x packing x dropout x where in an epoch"
CELLS = list(
    itertools.product(
        ("nf4", "none"),
        ("paged_adamw_8bit", "adamw_8bit", "adamw"),
        (True, False),
        (0.0, 0.2),
        ("middle", "end"),
    )
)


def run(cases: int, seed: int, folder: Path) -> Iterator[str | None]:
    """The cells in a random order, each once for a whole round of `len(CELLS)`."""
    order = random.Random(seed).sample(CELLS, len(CELLS))
    shop = Workshop.open(folder, seed)
    for case in range(cases):
        yield _one(shop, order[case % len(order)], case)


def _one(shop: Workshop, cell: tuple[Any, ...], case: int) -> str | None:
    quantization, optimizer, packing, dropout, place = cell
    told = f"{quantization}, {optimizer}, packing {packing}, dropout {dropout}, {place} of an epoch"
    # A step of two sequences: packing makes 7 steps an epoch of these rows, rows alone make 6.
    recipe = shop.recipe(
        model={"quantization": quantization},
        lora={"dropout": dropout, "dora": case % 7 == 3, "master_dtype": ("float32", "bfloat16")[case % 5 == 4]},
        data={"packing": packing, "held_out_fraction": 0.1 if packing else 0.7},
        train={"optimizer": optimizer, "epochs": 2, "log_every": 1 + case % 3},
        save={"every": 1, "keep": 100},
    )
    shop.clear("alone")
    shop.clear("stopped")
    shop.undisturbed(recipe, "alone")
    shutil.copytree(shop.folder / "alone", shop.folder / "stopped")
    saved = [path for _, path in reversed(checkpoint_files.steps_in(shop.folder / "stopped" / "checkpoints"))]
    middle = len(saved) // 2
    at = middle if place == "end" else middle - 2
    for path in saved[at:]:
        shutil.rmtree(path)
    ended = shop.start(recipe, "stopped").wait()
    if ended.code != 0:
        return f"{told}: resumed with exit {ended.code}, {ended.last_line}"
    fault = difference(shop.folder / "stopped", shop.folder / "alone")
    return None if fault is None else f"{told}: {fault}"
