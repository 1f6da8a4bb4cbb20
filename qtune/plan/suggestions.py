"""What to change when a run does not fit: only changes that were forecast to fit, nearest first."""

import math
from dataclasses import replace

from qtune.hardware import Device
from qtune.plan import ladder
from qtune.plan.forecast import Forecast, Forecaster
from qtune.plan.ladder import MARGIN_FRACTION, Budget, Climb
from qtune.plan.max_context import longest
from qtune.plan.overrides import FIELDS, written
from qtune.plan.workload import Work
from qtune.recipe.schema import Memory, Recipe
from qtune.units import GIB, KIB, MIB, format_bytes

MOST, LEAST_RANK = 3, 4


def remedies(recipe: Recipe, forecaster: Forecaster, work: Work, budget: Budget, found: Climb) -> tuple[str, ...]:
    """Up to three sentences, each naming a setting and a value with which the run would fit; `found` does not."""
    tries = (_left_open, _quantised, _shorter, _narrower, _more_host_memory)
    known = [sentence for attempt in tries if (sentence := attempt(recipe, forecaster, work, budget))]
    if found.forecast.host_bytes <= budget.host_bytes:  # or a larger device would not help
        needed = found.forecast.needed_bytes / (1 - MARGIN_FRACTION)
        known = [*known[: MOST - 1], f"a device with {_rounded_up(needed)} free (memory.budget)"]
    return tuple(known[:MOST])


def _fits(recipe: Recipe, forecaster: Forecaster, work: Work, budget: Budget) -> bool:
    """Whether `recipe`, which is not that of `forecaster`, fits with every technique on, one sequence at a time."""
    changed = replace(forecaster, recipe=recipe, _traces={})
    if ladder.has_no_room(recipe, changed, budget):
        return False
    tops = ladder.tops(recipe, changed, work.heaviest(1), budget.host_bytes)
    return any(budget.has_room_for(ladder.forecast(recipe, changed, work, top, 1)) for top in tops)


def _left_open(recipe: Recipe, forecaster: Forecaster, work: Work, budget: Budget) -> str | None:
    """What the recipe settles in [memory] and the plan would settle otherwise: one setting, or all of them."""
    keys = [key for key in FIELDS if getattr(recipe.memory, key) != "auto"]
    for left_out in [*([key] for key in keys), keys] if keys else []:
        memory = recipe.memory.model_copy(update={key: Memory.model_fields[key].default for key in left_out})
        if _fits(recipe.model_copy(update={"memory": memory}), forecaster, work, budget):
            return f"without {' and '.join(written(recipe, key) for key in left_out)}, which the plan can settle"
    return None


def _quantised(recipe: Recipe, forecaster: Forecaster, work: Work, budget: Budget) -> str | None:
    if recipe.model.quantization != "none":
        return None
    model = recipe.model.model_copy(update={"quantization": "nf4"})
    fits = _fits(recipe.model_copy(update={"model": model}), forecaster, work, budget)
    return 'model.quantization = "nf4" in place of "none"' if fits else None


def _shorter(recipe: Recipe, forecaster: Forecaster, work: Work, budget: Budget) -> str | None:
    tokens = longest(recipe, forecaster, budget).tokens
    if not tokens or tokens >= work.heaviest(1).tokens:
        return None
    return f"data.max_tokens = {tokens} (the longest that fits; rows over it go by data.on_long)"


def _narrower(recipe: Recipe, forecaster: Forecaster, work: Work, budget: Budget) -> str | None:
    """The largest of the halves of the rank that fits; where the smallest does not, the others are not asked about."""

    def fits(rank: int) -> bool:
        lora = recipe.lora.model_copy(update={"rank": rank})
        return _fits(recipe.model_copy(update={"lora": lora}), forecaster, work, budget)

    ranks = [rank for n in range(1, recipe.lora.rank.bit_length()) if (rank := recipe.lora.rank >> n) >= LEAST_RANK]
    if not ranks or not fits(ranks[-1]):
        return None
    rank = next((rank for rank in ranks[:-1] if fits(rank)), ranks[-1])
    return f"lora.rank = {rank} in place of {recipe.lora.rank}"


def _more_host_memory(recipe: Recipe, forecaster: Forecaster, work: Work, budget: Budget) -> str | None:
    """Where the host held the climb back."""
    unlimited = Budget(budget.device_bytes, 1 << 60)
    if ladder.has_no_room(recipe, forecaster, unlimited):
        return None
    climb = ladder.climb(recipe, forecaster, work, unlimited)
    if not climb.fits or climb.forecast.host_bytes <= budget.host_bytes:
        return None
    needed, now = _rounded_up(climb.forecast.host_bytes), format_bytes(budget.host_bytes)
    return f"{needed} of host memory in place of {now} (memory.host_budget)"


def _rounded_up(size: float) -> str:
    """`size` as text, no less than it is: a budget written so is enough."""
    unit = next((unit for unit in (GIB, MIB, KIB) if size >= unit), 1)
    step = unit / 10 if unit > 1 and size < 10 * unit else unit
    return format_bytes(math.ceil(size / step) * step)


def explain(recipe: Recipe, device: Device, needed: Forecast, budget: Budget, changes: tuple[str, ...]) -> str:
    """The whole message of a run that does not fit."""
    lacking = []
    if needed.needed_bytes > budget.device_bytes * (1 - MARGIN_FRACTION):
        lacking.append(
            f"{format_bytes(needed.needed_bytes)} with every technique that is allowed, and {device.label} has"
            f" {format_bytes(budget.device_bytes)}, of which {100 * MARGIN_FRACTION:.0f} % are kept free"
        )
    if needed.host_bytes > budget.host_bytes:
        lacking.append(
            f"{format_bytes(needed.host_bytes)} of host memory, of which {format_bytes(budget.host_bytes)} may be taken"
        )
    return "\n".join(
        [
            f"It does not fit: {recipe.model.base} at data.max_tokens = {recipe.data.max_tokens:,} takes"
            f" {'; and '.join(lacking)}." + (" What would fit:" if changes else ""),
            *(f"  {change}" for change in changes),
        ]
    )
