"""The ladder of memory techniques, cheapest first, and how far up it a run has to climb to fit.

The one that changes the loss is the last, whatever it costs: a plan takes it only where the host has no room for the
head beside what else has to be there.

Every rung that the recipe leaves open is climbed only if what is below it does not fit; once it fits, rungs that turn
out not to be needed are taken back, and those with a number are turned down as far as it goes. Where the host has no
room for all that is kept there, what a low rung keeps can be in the way of a higher one, so that the end of the climb
may not fit where another top of the ladder does: those are tried then.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from qtune.memory.techniques import STEPS, TECHNIQUES, Step, Techniques
from qtune.memory.techniques.standing import Standing
from qtune.plan.forecast import LOSS, Forecast, Forecaster
from qtune.plan.overrides import forced, refusals
from qtune.plan.workload import BatchShape, Work
from qtune.recipe.schema import Recipe

MARGIN_FRACTION = 0.03  # of the device; chosen: six times what the tests let a forecast be off, and room for a desktop
GROUND = "recomputed_layers"  # what other techniques stand on, and a large batch gains most by: never taken back whole
ATTENTION = "recomputed_attention"
FILLERS = (GROUND, ATTENTION)  # climbed before a batch is split, and turned down by what room is left at last


@dataclass(frozen=True)
class Budget:
    """Bytes that a run may take. A forecast fits if `MARGIN_FRACTION` of the device's is left over."""

    device_bytes: int
    host_bytes: int

    def spare_bytes(self, forecast: Forecast) -> float:
        """What is left on the device or the host, whichever is scarcer; negative for a forecast that does not fit."""
        on_device = self.device_bytes * (1 - MARGIN_FRACTION) - forecast.needed_bytes
        return min(on_device, self.host_bytes - forecast.host_bytes)

    def has_room_for(self, forecast: Forecast) -> bool:
        return self.spare_bytes(forecast) >= 0

    def with_all_the_host(self) -> "Budget":
        """The same of the device, and more of the host than there is anywhere."""
        return replace(self, host_bytes=1 << 60)


@dataclass(frozen=True)
class Reserve:
    """A rung above the plan's, for a run that is out of memory all the same: everything below it is on, too."""

    name: str
    techniques: Techniques


@dataclass(frozen=True)
class Climb:
    """Where the climb ended; `fits` is False where even the top does not."""

    fits: bool
    techniques: Techniques
    micro_batch: int
    forecast: Forecast


@dataclass(frozen=True)
class Ladder:
    """What a run may climb: forecasts of its model, what it trains on, and the memory that it may take."""

    forecaster: Forecaster
    work: Work
    budget: Budget

    @property
    def recipe(self) -> Recipe:
        return self.forecaster.recipe

    @cached_property
    def standing(self) -> Standing:
        return replace(self.forecaster.standing, document_tokens=self.work.document_tokens)

    @property
    def foot(self) -> Techniques:
        """Where the climb begins: with what the recipe settles itself."""
        return forced(self.recipe.memory, self.standing)

    @property
    def refusals(self) -> dict[str, str]:
        return refusals(self.recipe.memory, self.standing)

    def open_steps(self) -> list[Step]:
        """The rungs that the recipe leaves open and the model allows."""
        refused = self.refusals
        return [
            step
            for step in STEPS
            if getattr(self.recipe.memory, step.key) == "auto" and step.technique not in refused
            if self.standing.ranks > 1 or not TECHNIQUES[step.technique].needs_ranks
        ]

    def forecast(self, techniques: Techniques, micro_batch: int = 1) -> Forecast:
        """Of a step in which the heaviest batch is the largest."""
        train = self.recipe.train
        is_accumulated = train.gradient_accumulation > 1 or micro_batch < train.micro_batch
        return self.forecaster.forecast(techniques, self.work.heaviest(micro_batch), is_accumulated)

    def fits(self, techniques: Techniques, micro_batch: int = 1) -> bool:
        return self._stands(techniques) and self.budget.has_room_for(self.forecast(techniques, micro_batch))

    def climb(self) -> Climb:
        """The cheapest techniques with which the heaviest batch fits, else all of them. The effective batch is kept."""
        techniques, micro_batch = self.foot, self.recipe.train.micro_batch
        steps, climbed = self.open_steps(), list[Step]()
        first = [step for step in steps if step.technique in FILLERS]
        is_enough = self.fits(techniques, micro_batch)
        for step in [*first, None, *(step for step in steps if step not in first)]:
            if is_enough:
                break
            if step is None:
                micro_batch = self._split(techniques, micro_batch)
            elif higher := self._up(step, techniques, self.work.heaviest(micro_batch)):
                techniques, climbed = higher, [*climbed, step]
            else:
                continue
            is_enough = self.fits(techniques, micro_batch)
        if not is_enough:
            others = self.tops(self.work.heaviest(micro_batch))
            top = next((top for top in others if self.fits(top, micro_batch)), None)
            techniques, climbed, is_enough = top or techniques, steps, top is not None
        if is_enough:
            techniques = self._pruned(techniques, climbed, micro_batch)
        return self.stay(techniques, micro_batch)

    def stay(self, techniques: Techniques, micro_batch: int) -> Climb:
        """What `techniques` come to, whether they are enough or not."""
        forecast = self.forecast(techniques, micro_batch)
        return Climb(self.budget.has_room_for(forecast), techniques, micro_batch, forecast)

    def tops(self, batch: BatchShape) -> list[Techniques]:
        """The leanest sets of techniques: every open rung that costs the host nothing, and each way of spending the
        host's budget on the others, as many layers streamed as there is room for beside them. Where the inputs of all
        layers have no room there, fewer are recomputed. No plan of the ladder takes less of a device than the one of
        these that takes least. Those that round the head come last.
        """
        steps = self.open_steps()
        by_amount = [step for step in steps if TECHNIQUES[step.technique].fills_host]
        others = [step for step in steps if step not in by_amount]
        for_host = [step for step in others if step.is_for_host]
        ground = next((step for step in steps if step.technique == GROUND), None)
        leanest = []
        for count in range(len(for_host) + 1):
            for left_out in itertools.combinations(for_host, count):
                techniques = self.foot
                for step in others:
                    techniques = techniques if step in left_out else step.up(techniques, self.standing)
                if ground and self._host_bytes(techniques, batch) > self.budget.host_bytes:
                    techniques = self._as_the_host_allows(ground, techniques, batch)
                if self._host_bytes(techniques, batch) <= self.budget.host_bytes:
                    for step in by_amount:
                        techniques = self._as_the_host_allows(step, techniques, batch)
                    leanest.append(techniques)
        return sorted(dict.fromkeys(leanest), key=_is_lossy)

    def has_no_room(self) -> bool:
        """Whether not even what stands through a step has room with every rung climbed, however short the batch."""
        techniques = self.foot
        for step in self.open_steps():
            techniques = step.up(techniques, self.standing)
        return not self._stands(techniques)

    def reserve(self, climb: Climb) -> tuple[Reserve, ...]:
        """The open rungs above `climb`, in the order a run that is out of memory would take them."""
        techniques, batch = climb.techniques, self.work.heaviest(climb.micro_batch)
        above = []
        for step in self.open_steps():
            higher = self._up(step, techniques, batch)
            is_begun = TECHNIQUES[step.technique].fills_host and step.is_on(
                techniques
            )  # what is moved out is, once for all
            if higher is not None and not is_begun and not self._is_for_all(step, techniques):
                techniques = higher
                above.append(Reserve(step.name, techniques))
        return tuple(above)

    def _is_for_all(self, step: Step, techniques: Techniques) -> bool:
        """Whether all ranks would have to climb it at once, which one that runs out of memory cannot have them do."""
        technique = TECHNIQUES[step.technique]
        return technique.needs_ranks or (technique.moves_layers and techniques.sharded_layers > 0)

    def _split(self, techniques: Techniques, micro_batch: int) -> int:
        """The largest divisor of `micro_batch`, less than it, that fits; 1 where none does."""
        divisors = [n for n in range(micro_batch - 1, 0, -1) if micro_batch % n == 0]
        return next((n for n in divisors if self.fits(techniques, n)), 1)

    def _stands(self, techniques: Techniques) -> bool:
        """Whether there is room for a run before any batch is looked at, which saves tracing one in vain."""
        return self.forecaster.least_bytes(techniques) <= self.budget.device_bytes * (1 - MARGIN_FRACTION)

    def _host_bytes(self, techniques: Techniques, batch: BatchShape) -> int:
        return sum(self.forecaster.host_parts(techniques, batch).values())

    def _up(self, step: Step, techniques: Techniques, batch: BatchShape) -> Techniques | None:
        """`techniques` with `step` climbed; None where that changes nothing, or the host has no room for it."""
        if TECHNIQUES[step.technique].fills_host:
            higher = self._as_the_host_allows(step, techniques, batch)
        else:
            higher = step.up(techniques, self.standing)
        is_possible = higher != techniques and self._host_bytes(higher, batch) <= self.budget.host_bytes
        return higher if is_possible else None

    def _as_the_host_allows(self, step: Step, techniques: Techniques, batch: BatchShape) -> Techniques:
        """`techniques` with as much of `step` as the host has room for; as they are if that is nothing."""
        higher = step.up(techniques, self.standing)
        highest = getattr(higher, step.technique)
        amounts = [*TECHNIQUES[step.technique].amounts(highest), highest]

        def with_amount(place: int) -> Techniques:
            return higher.having(**{step.technique: amounts[place - 1]})

        def has_room(place: int) -> bool:
            return self._host_bytes(with_amount(place), batch) <= self.budget.host_bytes

        place = most(has_room, len(amounts))
        return with_amount(place) if place else techniques

    def _pruned(self, techniques: Techniques, climbed: Sequence[Step], micro_batch: int) -> Techniques:
        """`techniques` with amounts turned down as far as they go, less the rungs that are then not needed."""
        names = list(dict.fromkeys(step.technique for step in climbed))
        for name in names:
            if name not in FILLERS:
                techniques = self._turned_down(name, techniques, micro_batch)
        for step in reversed(climbed[:-1]):
            without = techniques.having(**{step.technique: getattr(self.foot, step.technique)})
            if step.technique not in FILLERS and self.fits(without, micro_batch):
                techniques = without
        return self._filled(techniques, GROUND in names, micro_batch)

    def _filled(self, techniques: Techniques, may_keep_layers: bool, micro_batch: int) -> Techniques:
        """`techniques` with the room that is left spent on layers that keep what they save, and on layers that keep
        attention's output: on that first which leaves less to be done again."""
        is_elsewhere = techniques.streamed_layers or techniques.sharded_layers
        turned = [GROUND] if may_keep_layers and not is_elsewhere else []
        is_open = any(step.technique == ATTENTION for step in self.open_steps())
        if is_open and techniques.recomputed_layers:
            if self._keeps_attention(techniques, micro_batch):
                turned.append(ATTENTION)
            techniques = techniques.having(recomputed_attention=techniques.recomputed_layers)
        filled = []
        for names in itertools.permutations(turned):
            less = techniques
            for name in names:
                less = self._turned_down(name, less, micro_batch)
            again = min(less.recomputed_attention, less.recomputed_layers)
            filled.append(less.having(recomputed_attention=again) if is_open else less)
        return min(filled, key=self._cost)

    def _keeps_attention(self, techniques: Techniques, micro_batch: int) -> bool:
        """Whether anything is kept of attention where it may be: math attention returns nothing that would do."""
        passes, batch = self.forecaster.passes, self.work.heaviest(micro_batch)
        return bool(passes.peaks(techniques.having(recomputed_attention=0), batch)[LOSS].device.get("kept attention"))

    def _cost(self, techniques: Techniques) -> float:
        return sum(step.cost(techniques, self.standing) for step in STEPS if step.is_on(techniques))

    def _turned_down(self, name: str, techniques: Techniques, micro_batch: int) -> Techniques:
        """`techniques`, which fit, with the least amount of one of them that does."""
        now = getattr(techniques, name)
        amounts: list[Any] = [*TECHNIQUES[name].amounts(now), now]

        def fits(place: int) -> bool:
            return self.fits(techniques.having(**{name: amounts[place]}), micro_batch)

        return techniques.having(**{name: amounts[least(fits, 0, len(amounts) - 1)]})


def _is_lossy(techniques: Techniques) -> bool:
    return any(step.is_lossy and step.is_on(techniques) for step in STEPS)


def least(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The smallest n in low..high for which `holds`, which it does at `high` and from some n on."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def most(holds: Callable[[int], bool], high: int) -> int:
    """The largest n in 1..high for which `holds`, which it does up to some n; 0 for none."""
    return least(lambda n: n > high or not holds(n), 1, high + 1) - 1
