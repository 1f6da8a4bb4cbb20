"""O1-O3: memory runs out in every place, in every spelling; the run is the same run, or is refused with what helps."""

import itertools
import logging
from collections.abc import Iterator
from pathlib import Path

from test_oom_recovery import (
    BATCHES,
    PLACES,
    SPELLINGS,
    STEPS,
    FaultAt,
    Run,
    assert_same,
    in_evaluation,
    recipe_for,
)

from fault_lab.workshop import Workshop, isolated

WHAT = "memory runs out, in every spelling, in the forward and backward pass and in an evaluation"
CELLS = list(itertools.product(range(len(SPELLINGS)), [*PLACES, "evaluation"]))
HANGS_SECONDS = 60.0
TOLERANCE = 5e-6  # AdamW makes a part of a step of a gradient's rounding where that is near 0: 1.5e-6 on one processor


def run(cases: int, seed: int, folder: Path) -> Iterator[str | None]:
    """The cells in turn, each in a batch of its own, once and several times in a row, and then without end."""
    logging.disable(logging.WARNING)
    shop = Workshop.open(folder, seed)
    recipe = recipe_for(shop.base)
    alone: list[Run] = []

    def judge(case: int) -> str | None:
        if not alone:
            alone.append(Run(recipe, folder / "alone"))
        spelling, place = CELLS[case % len(CELLS)]
        fault = SPELLINGS[spelling]
        batch = (seed + case) % (2 if place == "evaluation" else STEPS * BATCHES)
        times = 1 + case // len(CELLS) % 3
        endless = times == 3
        disturb = (PLACES | {"evaluation": in_evaluation})[place]
        at = range(batch, 10_000) if endless else range(batch, batch + times)
        told = f"{type(fault).__name__} in the {place}, batch {batch}, {'without end' if endless else f'{times} times'}"
        found = Run(recipe, folder / "disturbed", disturb(FaultAt(at, lambda: fault)))
        if endless:
            said = str(found.fault)
            return None if "ran out of memory" in said and "data.max_tokens" in said else f"{told}: {said}"
        try:
            assert_same(found, alone[0], TOLERANCE)
        except AssertionError as wrong:
            return f"{told}: {str(wrong).splitlines()[0]}"
        return None

    yield from isolated(cases, judge, HANGS_SECONDS)
