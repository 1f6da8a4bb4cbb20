"""What to change when a run does not fit: only changes that were forecast to fit, nearest first."""

from dataclasses import replace

from qtune.memory.device import Device
from qtune.plan import ladder
from qtune.plan.forecast import Forecaster
from qtune.plan.ladder import MARGIN_FRACTION, Budget
from qtune.plan.longest import longest
from qtune.plan.work import Work
from qtune.recipe.schema import Recipe
from qtune.units import format_bytes

MOST, LEAST_RANK = 3, 4


def remedies(recipe: Recipe, forecaster: Forecaster, work: Work, budget: Budget) -> tuple[str, ...]:
    """Up to three sentences, each naming a setting and a value with which the run would fit."""
    found = [
        _shorter(recipe, forecaster, work, budget),
        _narrower(recipe, forecaster, work, budget),
        _more_host_memory(recipe, forecaster, work, budget),
    ]
    known = [sentence for sentence in found if sentence is not None]
    return (*known[: MOST - 1], _larger_card(recipe, forecaster, work, budget))


def _shorter(recipe: Recipe, forecaster: Forecaster, work: Work, budget: Budget) -> str | None:
    tokens = longest(recipe, forecaster, budget)
    if tokens < 8 or tokens >= work.heaviest(1).tokens:
        return None
    return f"data.max_tokens = {tokens} (the longest that fits; rows over it go by data.on_long)"


def _narrower(recipe: Recipe, forecaster: Forecaster, work: Work, budget: Budget) -> str | None:
    rank = recipe.lora.rank // 2
    while rank >= LEAST_RANK:
        lora = recipe.lora.model_copy(update={"rank": rank})
        smaller = recipe.model_copy(update={"lora": lora})
        if ladder.climb(smaller, replace_recipe(forecaster, smaller), work, budget).fits:
            return f"lora.rank = {rank} in place of {recipe.lora.rank}"
        rank //= 2
    return None


def replace_recipe(forecaster: Forecaster, recipe: Recipe) -> Forecaster:
    return replace(forecaster, recipe=recipe, _traces={})


def _more_host_memory(recipe: Recipe, forecaster: Forecaster, work: Work, budget: Budget) -> str | None:
    """Where streaming was held back by the host."""
    roomy = Budget(budget.device_bytes, 1 << 60)
    climb = ladder.climb(recipe, forecaster, work, roomy)
    if not climb.fits or climb.forecast.host_bytes <= budget.host_bytes:
        return None
    needed, now = format_bytes(climb.forecast.host_bytes), format_bytes(budget.host_bytes)
    return f"{needed} of host memory for layers and checkpoints; {now} may be taken now (memory.host_budget)"


def _larger_card(recipe: Recipe, forecaster: Forecaster, work: Work, budget: Budget) -> str:
    climb = ladder.climb(recipe, forecaster, work, budget)
    needed = climb.forecast.device_bytes / (1 - MARGIN_FRACTION)
    return f"a device with {format_bytes(needed)} free (memory.budget)"


def explain(recipe: Recipe, device: Device, needed_bytes: int, budget: Budget, changes: tuple[str, ...]) -> str:
    """The whole message of a run that does not fit."""
    margin = f"{100 * MARGIN_FRACTION:.0f} %"
    return "\n".join(
        [
            f"It does not fit: {recipe.model.base} at data.max_tokens = {recipe.data.max_tokens:,} takes"
            f" {format_bytes(needed_bytes)} with every technique that is allowed, and {device.label} has"
            f" {format_bytes(budget.device_bytes)}, of which {margin} are kept free. What would fit:",
            *(f"  {change}" for change in changes),
        ]
    )
