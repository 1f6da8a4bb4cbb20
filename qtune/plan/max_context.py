"""The longest context that fits, one document in a batch, by whichever plan of the ladder takes it furthest.

Which plan that is changes with the length: what a long document keeps of its layers may have no room in host memory,
and then stands on the device while the host holds weights instead. So every top of the ladder is asked. What a pass
holds is nearly a straight line in the tokens, so it is traced at two lengths, and then where the lines say that the
budget ends, until that stays where it is.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass, field, replace
from typing import Literal

from qtune.memory.memory_tracker import Peak
from qtune.memory.techniques import Techniques
from qtune.plan import ladder
from qtune.plan.fake_step import Batch
from qtune.plan.forecast import Forecast, Forecaster, Parts, in_a_pass
from qtune.plan.ladder import MARGIN_FRACTION, Budget
from qtune.plan.overrides import forced
from qtune.plan.static_memory import Standing
from qtune.plan.workload import Work
from qtune.recipe.schema import Recipe

Bound = Literal["card", "host", "both"]
MOST_TOKENS = 4_194_304
STEP_TOKENS = 64
FIRST_TOKENS = (4096, 32_768)  # so long that tiles and kernels' workspaces no longer bend the line
EXACT_FRACTION, TRACES = 0.005, 10
FURTHER_FRACTION = 0.1  # longer by so much, more than one layer's weights are lacking


@dataclass(frozen=True)
class Longest:
    """Tokens, a multiple of 64, to half a percent; 0 where not even 64 fit. `bound` is what a tenth more of them is
    in want of: most of all the card's memory, or the host's, or of both about as much; None where nothing is."""

    tokens: int
    bound: Bound | None


def longest(recipe: Recipe, forecaster: Forecaster, budget: Budget) -> Longest:
    """The longest document with which any plan of the ladder fits `budget`."""
    if ladder.has_no_room(recipe, forecaster, budget):
        return Longest(0, "card")
    lines, fits = Lines.of(forecaster), 0
    for _ in range(TRACES):
        tokens = _furthest(recipe, lines, budget)
        top = _that_fits(recipe, lines, budget, tokens)
        if top is None or (fits and tokens - fits <= max(STEP_TOKENS, EXACT_FRACTION * fits)):
            break
        lines.trace(top, tokens)
        if budget.has_room_for(_forecast(recipe, lines, top, tokens)):
            fits = max(fits, tokens)
    return Longest(fits, _bound(recipe, lines, budget, fits))


def _furthest(recipe: Recipe, lines: "Lines", budget: Budget) -> int:
    """The most tokens that fit by the lines as they are now."""

    def fits(steps: int) -> bool:
        return _that_fits(recipe, lines, budget, steps * STEP_TOKENS) is not None

    return STEP_TOKENS * ladder.most(fits, MOST_TOKENS // STEP_TOKENS)


def _that_fits(recipe: Recipe, forecaster: Forecaster, budget: Budget, tokens: int) -> Techniques | None:
    """The first of the ladder's tops that fits."""
    tops = ladder.tops(recipe, forecaster, Batch.of_one_document(tokens), budget.host_bytes) if tokens else []
    return next((top for top in tops if budget.has_room_for(_forecast(recipe, forecaster, top, tokens))), None)


def _forecast(recipe: Recipe, forecaster: Forecaster, techniques: Techniques, tokens: int) -> Forecast:
    return ladder.forecast(recipe, forecaster, Work.of_full_sequences(tokens), techniques, 1)


def _bound(recipe: Recipe, lines: "Lines", budget: Budget, fits: int) -> Bound | None:
    if fits >= MOST_TOKENS:
        return None
    tokens = max(fits + STEP_TOKENS, round((1 + FURTHER_FRACTION) * fits))
    device, host = _lacking_device(recipe, lines, budget, tokens), _lacking_host(recipe, lines, budget, tokens)
    if min(device, host) > max(device, host) / 2:
        return "both"
    return "card" if device < host else "host"


def _lacking_device(recipe: Recipe, lines: "Lines", budget: Budget, tokens: int) -> float:
    """Bytes that the device would have to have more for these tokens, the host as it is."""
    tops = ladder.tops(recipe, lines, Batch.of_one_document(tokens), budget.host_bytes)
    needed = min((_forecast(recipe, lines, top, tokens).needed_bytes for top in tops), default=math.inf)
    return needed / (1 - MARGIN_FRACTION) - budget.device_bytes


def _lacking_host(recipe: Recipe, lines: "Lines", budget: Budget, tokens: int) -> float:
    """Bytes that the host would have to have more for these tokens, the device as it is."""
    unlimited, needed, fewest = Budget(budget.device_bytes, 1 << 60), [], forced(recipe, lines).streamed_layers
    for top in ladder.tops(recipe, lines, Batch.of_one_document(tokens)):

        def forecast(layers: int, top: Techniques = top) -> Forecast:
            return _forecast(recipe, lines, replace(top, streamed_layers=layers), tokens)

        if unlimited.has_room_for(forecast(top.streamed_layers)):
            layers = ladder.least(lambda n: unlimited.has_room_for(forecast(n)), fewest, top.streamed_layers)
            needed.append(forecast(layers).host_bytes)
    return min(needed, default=math.inf) - budget.host_bytes


@dataclass
class Lines(Forecaster):
    """Forecasts of one document of any length, on the line through the nearest two lengths that were traced."""

    exact: Forecaster = field(kw_only=True)
    _lengths: dict[Techniques, set[int]] = field(default_factory=dict)

    @classmethod
    def of(cls, exact: Forecaster) -> "Lines":
        return cls(exact.config, exact.recipe, exact.compute_dtype, exact.is_card, exact.context_bytes, exact=exact)

    @property
    def standing(self) -> Standing:
        return self.exact.standing

    def trace(self, techniques: Techniques, tokens: int) -> None:
        """Be exact at these tokens from now on."""
        self._lengths.setdefault(in_a_pass(techniques), {*FIRST_TOKENS}).add(tokens)

    def _passing(self, techniques: Techniques, batch: Batch) -> dict[str, Peak]:
        low, high = self._around(in_a_pass(techniques), batch.tokens)
        share = (batch.tokens - low) / (high - low)
        first, second = (self.exact._passing(techniques, Batch.of_one_document(tokens)) for tokens in (low, high))
        return {phase: _between(peak, second[phase], share) for phase, peak in first.items()}

    def _checkpoint_bytes(self, batch: Batch) -> int:
        at_first = self.exact._checkpoint_bytes(Batch.of_one_document(FIRST_TOKENS[0]))
        return at_first * batch.tokens // FIRST_TOKENS[0]

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
