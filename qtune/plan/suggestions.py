"""What to change when a run does not fit: only changes that were forecast to fit, nearest first."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from qtune.errors import DoesNotFit
from qtune.hardware import Device
from qtune.plan.forecast import Forecast, Forecaster
from qtune.plan.ladder import MARGIN_FRACTION, Budget, Climb, Ladder
from qtune.plan.max_context import longest
from qtune.plan.overrides import settled, written
from qtune.plan.plan import Plan
from qtune.recipe.schema import Recipe
from qtune.units import GIB, KIB, MIB, format_bytes

MOST = 3  # of suggestions: more are not read
LEAST_RANK = 4  # below it an adapter seldom learns a task


def remedies(ladder: Ladder, climb: Climb, forecaster_of: Callable[[Recipe], Forecaster]) -> tuple[str, ...]:
    """Up to three sentences, each naming a setting and a value with which the run would fit; `climb`, which ends at the
    top of `ladder`, does not. `forecaster_of` another recipe forecasts that one on the same device."""
    attempts = (attempt() for attempt in Attempts(ladder, forecaster_of).nearest_first)
    known = list(itertools.islice(filter(None, attempts), MOST))  # no more are tried than are told
    if climb.forecast.host_bytes <= ladder.budget.host_bytes:  # or a larger device would not help
        needed = climb.forecast.needed_bytes / (1 - MARGIN_FRACTION)
        known = [*known[: MOST - 1], f"a device with {_rounded_up(needed)} free (memory.budget)"]
    return tuple(known[:MOST])


@dataclass(frozen=True)
class Attempts:
    """Changes of a run that does not fit, each a sentence, or None where the run would not fit with it either."""

    ladder: Ladder
    forecaster_of: Callable[[Recipe], Forecaster]

    @property
    def nearest_first(self) -> tuple[Callable[[], str | None], ...]:
        return self.left_open, self.quantised, self.shorter, self.narrower, self.more_host_memory

    def left_open(self) -> str | None:
        """What the recipe settles in [memory] and the plan would settle otherwise: one setting, or all of them."""
        recipe = self.ladder.recipe
        every = settled(recipe.memory)
        for left_out in [*([each] for each in every), every] if every else []:
            memory = recipe.memory.model_copy(update={each.key: "auto" for each in left_out})
            if self._fits(recipe.model_copy(update={"memory": memory})):
                return f"without {' and '.join(written(recipe, each) for each in left_out)}, which the plan can settle"
        return None

    def quantised(self) -> str | None:
        recipe = self.ladder.recipe
        if recipe.model.quantization != "none":
            return None
        model = recipe.model.model_copy(update={"quantization": "nf4"})
        fits = self._fits(recipe.model_copy(update={"model": model}))
        return 'model.quantization = "nf4" in place of "none"' if fits else None

    def shorter(self) -> str | None:
        tokens = longest(self.ladder.forecaster, self.ladder.budget).tokens
        if not tokens or tokens >= self.ladder.work.heaviest(1).tokens:
            return None
        return f"data.max_tokens = {tokens} (the longest that fits; rows over it go by data.on_long)"

    def narrower(self) -> str | None:
        """The largest half of the rank that fits; where the smallest does not, the others are not asked about."""
        recipe = self.ladder.recipe
        if recipe.lora.start_from is not None:  # which has the rank that it has
            return None

        def fits(rank: int) -> bool:
            lora = recipe.lora.model_copy(update={"rank": rank})
            return self._fits(recipe.model_copy(update={"lora": lora}))

        halves = [recipe.lora.rank >> n for n in range(1, recipe.lora.rank.bit_length())]
        ranks = [rank for rank in halves if rank >= LEAST_RANK]
        if not ranks or not fits(ranks[-1]):
            return None
        rank = next((rank for rank in ranks[:-1] if fits(rank)), ranks[-1])
        return f"lora.rank = {rank} in place of {recipe.lora.rank}"

    def more_host_memory(self) -> str | None:
        """Where the host held the climb back."""
        unlimited = replace(self.ladder, budget=self.ladder.budget.with_all_the_host())
        if unlimited.has_no_room():
            return None
        climb, host_bytes = unlimited.climb(), self.ladder.budget.host_bytes
        if not climb.fits or climb.forecast.host_bytes <= host_bytes:
            return None
        needed, now = _rounded_up(climb.forecast.host_bytes), format_bytes(host_bytes)
        return f"{needed} of host memory in place of {now} (memory.host_budget)"

    def _fits(self, recipe: Recipe) -> bool:
        """Whether `recipe` fits with every technique on, one sequence at a time."""
        ladder = replace(self.ladder, forecaster=self.forecaster_of(recipe))
        if ladder.has_no_room():
            return False
        return any(ladder.budget.has_room_for(ladder.forecast(top)) for top in ladder.tops(ladder.work.heaviest(1)))


def _rounded_up(size: float) -> str:
    """`size` as text, no less than it is: a budget written so is enough."""
    unit = next((unit for unit in (GIB, MIB, KIB) if size >= unit), 1)
    step = unit / 10 if unit > 1 and size < 10 * unit else unit
    return format_bytes(math.ceil(size / step) * step)


def refuse_unless_it_fits(recipe: Recipe, plan: Plan) -> None:
    """Raises DoesNotFit, with the changes that would, for a plan that must not run."""
    if not plan.fits:
        raise DoesNotFit(_explained(recipe, plan.device, plan.forecast, plan.budget, plan.remedies))


def _explained(recipe: Recipe, device: Device, needed: Forecast, budget: Budget, changes: tuple[str, ...]) -> str:
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
