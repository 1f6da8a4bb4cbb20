"""The longest context that fits, one document in a batch, by whichever plan of the ladder takes it furthest.

Which plan that is changes with the length: what a long document keeps of its layers may have no room in host memory,
and then stands on the device while the host holds weights instead. So every top of the ladder is asked. What a pass
holds is nearly a straight line in the tokens, but for short ones, where tiles and workspaces grow with them. So it is
traced at a few lengths, of which only those next to an answer are looked at, and then where the lines between them say
that the budget ends, until that stays where it is.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass, field, replace
from typing import Literal

from qtune.memory.memory_tracker import Peak
from qtune.memory.techniques import TECHNIQUES, Techniques
from qtune.memory.techniques.standing import Parts
from qtune.plan.forecast import Forecast, Forecaster, Passes
from qtune.plan.ladder import MARGIN_FRACTION, Budget, Ladder, least, most
from qtune.plan.workload import BatchShape, Work
from qtune.recipe.schema import MAX_TOKENS

Bound = Literal["card", "host", "both"]
STEP_TOKENS = 64
FIRST_TOKENS = (STEP_TOKENS, 1024, 5120, 32_768)  # most tiles are whole from 1024 on, and the loss's as large as any
EXACT_FRACTION = 0.005  # of the tokens: less than lengths of one data set differ by from another
TRACES = 10  # three or four are enough where the line is straight
FURTHER_FRACTION = 0.1  # longer by so much, more than one layer's weights are lacking


@dataclass(frozen=True)
class Longest:
    """Tokens, a multiple of 64, to half a percent; 0 where not even 64 fit. `bound` is what a tenth more of them is
    in want of: most of all the card's memory, or the host's, or of both about as much; None where nothing is."""

    tokens: int
    bound: Bound | None


def longest(forecaster: Forecaster, budget: Budget) -> Longest:
    """The longest document with which any plan of the ladder fits `budget`."""
    lines = Lines(forecaster.passes)
    search = Search(replace(forecaster, passes=lines), budget)
    if search.at(STEP_TOKENS).has_no_room():
        return Longest(0, "card")
    fits = 0
    for _ in range(TRACES):
        tokens = STEP_TOKENS * most(
            lambda steps: search.top(steps * STEP_TOKENS) is not None, MAX_TOKENS // STEP_TOKENS
        )
        top = search.top(tokens)
        if top is None or (fits and tokens - fits <= max(STEP_TOKENS, EXACT_FRACTION * fits)):
            break
        lines.be_exact_at(tokens, top)
        if budget.has_room_for(search.at(tokens).forecast(top)):
            fits = max(fits, tokens)
    return Longest(fits, search.bound(fits))


@dataclass(frozen=True)
class Search:
    """Whether documents of any length fit, by forecasts on lines that others make more exact meanwhile."""

    forecaster: Forecaster
    budget: Budget

    def at(self, tokens: int) -> Ladder:
        """The ladder of a run on documents of so many tokens, one at a time."""
        return Ladder(self.forecaster, Work.of_full_sequences(tokens), self.budget)

    def top(self, tokens: int) -> Techniques | None:
        """The first of the ladder's tops that fits."""
        ladder = self.at(tokens)
        tops = ladder.tops(BatchShape.of_one_document(tokens)) if tokens else []
        return next((top for top in tops if self.budget.has_room_for(ladder.forecast(top))), None)

    def bound(self, fits: int) -> Bound | None:
        """What is lacking for a tenth more than `fits`."""
        if fits >= MAX_TOKENS:
            return None
        tokens = max(fits + STEP_TOKENS, round((1 + FURTHER_FRACTION) * fits))
        device, host = self._lacking_device(tokens), self._lacking_host(tokens)
        if min(device, host) > max(device, host) / 2:
            return "both"
        return "card" if device < host else "host"

    def _lacking_device(self, tokens: int) -> float:
        """Bytes that the device would have to have more for these tokens, the host as it is."""
        ladder = self.at(tokens)
        tops = ladder.tops(BatchShape.of_one_document(tokens))
        needed = min((ladder.forecast(top).needed_bytes for top in tops), default=math.inf)
        return needed / (1 - MARGIN_FRACTION) - self.budget.device_bytes

    def _lacking_host(self, tokens: int) -> float:
        """Bytes that the host would have to have more for these tokens, the device as it is."""
        ladder = replace(self.at(tokens), budget=self.budget.with_all_the_host())
        tops = ladder.tops(BatchShape.of_one_document(tokens))
        needed = [
            _least_host(ladder, top).host_bytes for top in tops if ladder.budget.has_room_for(ladder.forecast(top))
        ]
        return min(needed, default=math.inf) - self.budget.host_bytes


def _least_host(ladder: Ladder, top: Techniques) -> Forecast:
    """Of `top`, which fits, with no more in host memory than has to be there."""
    for name, each in TECHNIQUES.items():
        if each.fills_host:
            now, fewest = getattr(top, name), getattr(ladder.foot, name)
            amounts = [*(n for n in (each.off, *each.amounts(now)) if n >= fewest and n != now), now]

            def fits(place: int, name: str = name, amounts: list[int] = amounts, top: Techniques = top) -> bool:
                return ladder.budget.has_room_for(ladder.forecast(top.having(**{name: amounts[place]})))

            top = top.having(**{name: amounts[least(fits, 0, len(amounts) - 1)]})
    return ladder.forecast(top)


@dataclass(frozen=True)
class Lines:
    """Passes through one document of any length, on the line through the nearest two lengths that were traced."""

    exact: Passes
    _lengths: dict[Techniques, set[int]] = field(default_factory=dict)

    def be_exact_at(self, tokens: int, techniques: Techniques) -> None:
        """From now on."""
        self._lengths.setdefault(techniques.in_a_pass(), {*FIRST_TOKENS}).add(tokens)

    def peaks(self, techniques: Techniques, batch: BatchShape) -> dict[str, Peak]:
        low, high = self._around(techniques.in_a_pass(), batch.tokens)
        share = (batch.tokens - low) / (high - low)
        first, second = (self.exact.peaks(techniques, BatchShape.of_one_document(tokens)) for tokens in (low, high))
        return {phase: _between(peak, second[phase], share) for phase, peak in first.items()}

    def checkpoint_bytes(self, batch: BatchShape) -> int:
        at_last = self.exact.checkpoint_bytes(BatchShape.of_one_document(FIRST_TOKENS[-1]))
        return at_last * batch.tokens // FIRST_TOKENS[-1]

    def moved_bytes(self, techniques: Techniques, batch: BatchShape) -> int:
        at_last = self.exact.moved_bytes(techniques, BatchShape.of_one_document(FIRST_TOKENS[-1]))
        return at_last * batch.tokens // FIRST_TOKENS[-1]

    def _around(self, techniques: Techniques, tokens: int) -> tuple[int, int]:
        known = sorted(self._lengths.get(techniques, FIRST_TOKENS))
        after = min(max(1, bisect_left(known, tokens)), len(known) - 1)
        return known[after - 1], known[after]


def _between(first: Peak, second: Peak, share: float) -> Peak:
    """`share` of the way from one peak to another, or beyond, part by part."""
    return Peak(
        *(_parts_between(*sides, share) for sides in ((first.device, second.device), (first.host, second.host)))
    )


def _parts_between(first: Parts, second: Parts, share: float) -> Parts:
    return {
        part: max(0, round((1 - share) * first.get(part, 0) + share * second.get(part, 0))) for part in first | second
    }
