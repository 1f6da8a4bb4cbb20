"""A plan's rungs as they are told: what each technique does here, and what those that are off would do."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from qtune.memory.techniques import Techniques
from qtune.plan import ladder
from qtune.plan.forecast import Forecaster
from qtune.plan.ladder import STEPS, Climb, Step
from qtune.plan.overrides import refusals
from qtune.plan.workload import Work
from qtune.recipe.schema import Recipe

SHOWN = tuple(step for step in STEPS if step.name != "smaller tiles")


@dataclass(frozen=True)
class Rung:
    """One technique in a plan. `saved_bytes` on the device and `host_bytes` are the difference it makes here, None
    where nobody asked; `cost_fraction` is an estimate of the time it adds to a step."""

    name: str
    setting: str
    is_on: bool
    saved_bytes: int | None
    host_bytes: int | None
    cost_fraction: float
    note: str


def rungs(recipe: Recipe, forecaster: Forecaster, work: Work, climb: Climb, weighs_all: bool) -> Iterator[Rung]:
    """Every rung. One that is on is weighed against the same without it; one that is off, if `weighs_all`, against the
    same with it, which takes a trace of its own."""
    techniques, refused = climb.techniques, refusals(recipe, forecaster)
    for step in SHOWN:
        is_on, note = step.is_on(techniques), step.note
        if step.field in refused and not is_on:
            yield Rung(step.name, step.key, False, None, None, 0.0, f"refused: {refused[step.field]}")
            continue
        if getattr(recipe.memory, step.key) != "auto":
            note = f"memory.{step.key} says so; {note}"
        low, high = _without(step, techniques) if is_on else (techniques, step.up(techniques, forecaster))
        saved, on_host = (
            _difference(recipe, forecaster, work, climb, low, high) if is_on or weighs_all else (None, None)
        )
        name = step.name + _amount(step.field, high, forecaster)
        yield Rung(name, step.key, is_on, saved, on_host, step.cost(high, forecaster), note)


def _without(step: Step, techniques: Techniques) -> tuple[Techniques, Techniques]:
    """`techniques` without the rung, and with it; both without what only goes with recomputation, if that is it."""
    low = replace(techniques, **{step.field: getattr(Techniques(), step.field)})
    if step.field != "recomputed_layers":
        return low, techniques
    with_it = replace(techniques, host_checkpoints=False, streamed_layers=0)
    return replace(with_it, recomputed_layers=low.recomputed_layers), with_it


def _difference(
    recipe: Recipe, forecaster: Forecaster, work: Work, climb: Climb, low: Techniques, high: Techniques
) -> tuple[int, int]:
    """Bytes that `high` saves on the device, and takes in host memory, beside `low`."""
    before, after = (
        climb.forecast if t == climb.techniques else ladder.forecast(recipe, forecaster, work, t, climb.micro_batch)
        for t in (low, high)
    )
    return before.device_bytes - after.device_bytes, after.host_bytes - before.host_bytes


def _amount(field: str, techniques: Techniques, forecaster: Forecaster) -> str:
    """` 12 of 32`, ` of 1,024 tokens`: how much of a technique that has an amount."""
    value = getattr(techniques, field)
    if field in ("recomputed_layers", "streamed_layers"):
        return f", {value} of {forecaster.layers}"
    if field == "tile_tokens":
        return f" of {value:,} tokens"
    return f", {value}" if field == "head_groups" else ""
