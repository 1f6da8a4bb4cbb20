"""A plan's rungs as they are told: what each technique does here, and what those that are off would do."""

from collections.abc import Iterator
from dataclasses import dataclass

from qtune.memory.techniques import STEPS, TECHNIQUES, Step, Techniques
from qtune.plan.ladder import GROUND, Climb, Ladder

SHOWN = tuple(step for step in STEPS if step.is_told)


@dataclass(frozen=True)
class Rung:
    """One technique in a plan. `saved_bytes` on the device and `host_bytes` are the difference it makes here, None
    where nobody asked or it is refused; `cost_fraction` is an estimate of the time it adds to a step."""

    name: str
    setting: str
    is_on: bool
    saved_bytes: int | None
    host_bytes: int | None
    cost_fraction: float
    note: str


def rungs(ladder: Ladder, climb: Climb, weighs_all: bool) -> Iterator[Rung]:
    """Every rung. One that is on is weighed against the same without it; one that is off, if `weighs_all`, against the
    same with it, which takes a trace of its own."""
    on, standing, refused = climb.techniques, ladder.standing, ladder.refusals
    for step in SHOWN:
        if TECHNIQUES[step.technique].needs_ranks and standing.ranks == 1:
            continue
        is_on, note = step.is_on(on), step.note
        if step.technique in refused and not is_on:
            yield Rung(step.name, step.key, False, None, None, 0.0, f"refused: {refused[step.technique]}")
            continue
        if getattr(ladder.recipe.memory, step.key) != "auto":
            note = f"memory.{step.key} says so; {note}"
        low, high = _without(step, on) if is_on else (on, step.up(on, standing))
        saved, on_host = _difference(ladder, climb, low, high) if is_on or weighs_all else (None, None)
        name = step.name + TECHNIQUES[step.technique].amount(getattr(high, step.technique), standing)
        yield Rung(name, step.key, is_on, saved, on_host, step.cost(high, standing), note)


def _without(step: Step, techniques: Techniques) -> tuple[Techniques, Techniques]:
    """`techniques` without the rung, and with it; both without what only goes with recomputation, if that is it."""
    off = {step.technique: TECHNIQUES[step.technique].off}
    with_it = techniques
    if step.technique == GROUND:
        with_it = techniques.having(host_checkpoints=False, streamed_layers=0, sharded_layers=0)
    return with_it.having(**off), with_it


def _difference(ladder: Ladder, climb: Climb, low: Techniques, high: Techniques) -> tuple[int, int]:
    """Bytes that `high` saves on the device, and takes in host memory, beside `low`."""
    before, after = (
        climb.forecast if each == climb.techniques else ladder.forecast(each, climb.micro_batch) for each in (low, high)
    )
    return before.device_bytes - after.device_bytes, after.host_bytes - before.host_bytes
