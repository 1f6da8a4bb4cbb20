"""The ladder of memory techniques, cheapest first, and how far up it a run has to climb to fit.

The one that changes the loss is the last, whatever it costs: a plan takes it only where the host has no room for the
head beside what else has to be there.

Every rung that the recipe leaves open is climbed only if what is below it does not fit; once it fits, rungs that turn
out not to be needed are taken back, and those with a number are turned down as far as it goes. Where the host has no
room for all that is kept there, what a low rung keeps can be in the way of a higher one, so that the end of the climb
may not fit where another top of the ladder does: those are tried then.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from qtune.memory.techniques import Techniques
from qtune.plan.fake_step import Batch
from qtune.plan.forecast import Forecast, Forecaster
from qtune.plan.overrides import FIELDS, forced, key_value_heads, refusals
from qtune.plan.workload import Work
from qtune.recipe.schema import Recipe

MARGIN_FRACTION = 0.03
TILE_TOKENS, SMALL_TILE_TOKENS = 1024, 256
MOST_HEAD_GROUPS = 8


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


@dataclass(frozen=True)
class Reserve:
    """A rung above the plan's, for a run that is out of memory all the same: everything below it is on, too."""

    name: str
    techniques: Techniques


@dataclass(frozen=True)
class Step:
    """How a rung is climbed: `key` is its setting in the recipe, `value` what it sets where others set the same;
    `is_for_host`: what it takes off the device stands in host memory."""

    name: str
    key: str
    up: Callable[[Techniques, Forecaster], Techniques]
    cost: Callable[[Techniques, Forecaster], float]
    note: str
    value: str | None = None
    is_for_host: bool = False

    @property
    def field(self) -> str:
        """Its field in Techniques."""
        return FIELDS[self.key]

    def is_on(self, techniques: Techniques) -> bool:
        now = getattr(techniques, self.field)
        return now != getattr(Techniques(), self.field) if self.value is None else now == self.value


@dataclass(frozen=True)
class Climb:
    """Where the climb ended; `fits` is False where even the top does not."""

    fits: bool
    techniques: Techniques
    micro_batch: int
    forecast: Forecast


def _most_groups(forecaster: Forecaster) -> int:
    heads = key_value_heads(forecaster)
    return max(n for n in range(1, MOST_HEAD_GROUPS + 1) if heads % n == 0)


def _recompute_cost(techniques: Techniques, forecaster: Forecaster) -> float:
    """A forward pass again beside one forward and one backward, which cost alike: frozen weights have no gradient."""
    return 0.5 * techniques.recomputed_layers / max(1, forecaster.layers)


def _head_cost(techniques: Techniques, forecaster: Forecaster) -> float:
    """The logits once more: a third of the head's share of a step with recomputation."""
    text = forecaster.config.get_text_config()
    return text.vocab_size * text.hidden_size / max(1, 3 * forecaster.standing.active_parameters)


STEPS = (
    Step(
        "recompute layers",
        "keep_layers",
        lambda t, f: replace(t, recomputed_layers=f.layers),
        _recompute_cost,
        "activations are made again in the backward pass",
    ),
    Step(
        "checkpoints in host memory",
        "checkpoints",
        lambda t, f: replace(t, host_checkpoints=True),
        lambda t, f: 0.03 * t.recomputed_layers / max(1, f.layers),
        "copied on a stream of their own",
        is_for_host=True,
    ),
    Step(
        "MLP and norms in tiles",
        "tile_tokens",
        lambda t, f: replace(t, tile_tokens=TILE_TOKENS),
        lambda t, f: 0.05 * TILE_TOKENS / max(1, t.tile_tokens),
        "weights are dequantised once a tile",
    ),
    Step(
        "embedding in host memory",
        "embedding",
        lambda t, f: replace(t, host_embedding=True),
        lambda t, f: 0.005,
        "only the rows looked up are copied",
        is_for_host=True,
    ),
    Step(
        "streamed layers",
        "stream_layers",
        lambda t, f: replace(t, streamed_layers=f.layers, recomputed_layers=f.layers),
        lambda t, f: 0.10 * t.streamed_layers / max(1, f.layers),
        "copied in ahead of their turn, forward and backward",
        is_for_host=True,
    ),
    Step(
        "heads in groups",
        "head_groups",
        lambda t, f: replace(t, head_groups=_most_groups(f)),
        lambda t, f: 0.10,
        "attention runs once more",
    ),
    Step(
        "smaller tiles",
        "tile_tokens",
        lambda t, f: replace(t, tile_tokens=SMALL_TILE_TOKENS),
        lambda t, f: 0.05 * TILE_TOKENS / max(1, t.tile_tokens),
        "weights are dequantised once a tile",
    ),
    Step(
        "output head in host memory",
        "head",
        lambda t, f: t if t.head == "nf4" else replace(t, head="host"),
        lambda t, f: 0.05 + _head_cost(t, f),
        "slices of it are copied in for the loss, and the logits made twice",
        "host",
        is_for_host=True,
    ),
    Step(
        "output head in NF4",
        "head",
        lambda t, f: t if t.head == "host" else replace(t, head="nf4"),
        _head_cost,
        "where the host has no room; the only one that moves the loss, as it rounds the head while training",
        "nf4",
    ),
)


def open_steps(recipe: Recipe, forecaster: Forecaster) -> list[Step]:
    """The rungs that the recipe leaves open and the model allows."""
    refused = refusals(recipe, forecaster)
    return [step for step in STEPS if getattr(recipe.memory, step.key) == "auto" and step.field not in refused]


def climb(recipe: Recipe, forecaster: Forecaster, work: Work, budget: Budget) -> Climb:
    """The cheapest techniques with which the heaviest batch of `work` fits, else all of them. The effective batch is
    kept."""

    def fits(techniques: Techniques, micro_batch: int) -> bool:
        if not _stands(techniques, forecaster, budget):
            return False
        return budget.has_room_for(forecast(recipe, forecaster, work, techniques, micro_batch))

    def split(micro_batch: int) -> int:
        return next((m for m in _divisors(micro_batch) if fits(techniques, m)), 1)

    start = forced(recipe, forecaster)
    micro_batch, techniques = recipe.train.micro_batch, start
    steps, climbed = open_steps(recipe, forecaster), list[Step]()
    is_enough = fits(techniques, micro_batch)
    if not is_enough and (STEPS[0] not in steps or STEPS[0].up(start, forecaster) == start):
        micro_batch = split(micro_batch)
        is_enough = fits(techniques, micro_batch)
    for step in steps:
        if is_enough:
            break
        tried = _up(step, techniques, forecaster, work.heaviest(micro_batch), budget)
        if tried is None:
            continue
        techniques, climbed = tried, [*climbed, step]
        is_enough = fits(techniques, micro_batch)
        if not is_enough and step.field == "recomputed_layers":
            micro_batch = split(micro_batch)
            is_enough = fits(techniques, micro_batch)
    if not is_enough:
        others = tops(recipe, forecaster, work.heaviest(micro_batch), budget.host_bytes)
        top = next((top for top in others if fits(top, micro_batch)), None)
        techniques, climbed, is_enough = top or techniques, steps, top is not None
    if is_enough:
        techniques = _pruned(techniques, start, climbed, lambda t: fits(t, micro_batch))
    return stay(recipe, forecaster, work, budget, techniques, micro_batch)


def stay(
    recipe: Recipe, forecaster: Forecaster, work: Work, budget: Budget, techniques: Techniques, micro_batch: int
) -> Climb:
    """What `techniques` come to, whether they are enough or not."""
    found = forecast(recipe, forecaster, work, techniques, micro_batch)
    return Climb(budget.has_room_for(found), techniques, micro_batch, found)


def forecast(recipe: Recipe, forecaster: Forecaster, work: Work, techniques: Techniques, micro_batch: int) -> Forecast:
    """Of a step in which the heaviest batch of `work` is the largest."""
    is_accumulated = recipe.train.gradient_accumulation > 1 or micro_batch < recipe.train.micro_batch
    return forecaster.forecast(techniques, work.heaviest(micro_batch), is_accumulated)


def tops(recipe: Recipe, forecaster: Forecaster, batch: Batch, host_bytes: float = math.inf) -> list[Techniques]:
    """The leanest sets of techniques: every open rung that costs the host nothing, and each way of spending
    `host_bytes` on the others, as many layers streamed as there is room for beside them. No plan of the ladder takes
    less of a device than the one of these that takes least. Those that round the head come last.
    """
    steps = open_steps(recipe, forecaster)
    streaming = [step for step in steps if step.field == "streamed_layers"]
    others = [step for step in steps if step not in streaming]
    for_host = [step for step in others if step.is_for_host]
    found = []
    for count in range(len(for_host) + 1):
        for left_out in itertools.combinations(for_host, count):
            techniques = forced(recipe, forecaster)
            for step in others:
                techniques = techniques if step in left_out else step.up(techniques, forecaster)
            if _host_bytes(techniques, forecaster, batch) <= host_bytes:
                for step in streaming:
                    techniques = _streamed(step.up(techniques, forecaster), techniques, forecaster, batch, host_bytes)
                found.append(techniques)
    return sorted(dict.fromkeys(found), key=lambda techniques: techniques.head == "nf4")


def _streamed(
    higher: Techniques, techniques: Techniques, forecaster: Forecaster, batch: Batch, host_bytes: float
) -> Techniques:
    """`higher` with as many of its layers streamed as `host_bytes` have room for; `techniques` if that is none."""

    def has_room(layers: int) -> bool:
        return _host_bytes(replace(higher, streamed_layers=layers), forecaster, batch) <= host_bytes

    layers = most(has_room, higher.streamed_layers)
    return replace(higher, streamed_layers=layers) if layers else techniques


def _host_bytes(techniques: Techniques, forecaster: Forecaster, batch: Batch) -> int:
    return sum(forecaster.host_parts(techniques, batch).values())


def has_no_room(recipe: Recipe, forecaster: Forecaster, budget: Budget) -> bool:
    """Whether not even what stands through a step has room with every open rung climbed, however short the batch."""
    techniques = forced(recipe, forecaster)
    for step in open_steps(recipe, forecaster):
        techniques = step.up(techniques, forecaster)
    return not _stands(techniques, forecaster, budget)


def _stands(techniques: Techniques, forecaster: Forecaster, budget: Budget) -> bool:
    """Whether there is room for a run before any batch is looked at, which saves tracing one in vain."""
    return forecaster.least_bytes(techniques) <= budget.device_bytes * (1 - MARGIN_FRACTION)


def reserve(
    recipe: Recipe, forecaster: Forecaster, techniques: Techniques, batch: Batch, budget: Budget
) -> tuple[Reserve, ...]:
    """The open rungs above `techniques`, in the order a run that is out of memory would take them."""
    found = []
    for step in open_steps(recipe, forecaster):
        higher = _up(step, techniques, forecaster, batch, budget)
        is_streaming = step.field == "streamed_layers" and techniques.streamed_layers > 0
        if higher is not None and not is_streaming:
            techniques = higher
            found.append(Reserve(step.name, techniques))
    return tuple(found)


def _up(step: Step, techniques: Techniques, forecaster: Forecaster, batch: Batch, budget: Budget) -> Techniques | None:
    """`techniques` with `step` climbed; None where that changes nothing, or takes more host memory than there is.

    As many layers are streamed as the host has room for.
    """
    higher = step.up(techniques, forecaster)
    if step.field == "tile_tokens" and 0 < techniques.tile_tokens <= higher.tile_tokens:
        return None
    if step.field == "streamed_layers":
        higher = _streamed(higher, techniques, forecaster, batch, budget.host_bytes)
    return higher if higher != techniques and _host_bytes(higher, forecaster, batch) <= budget.host_bytes else None


def _pruned(
    techniques: Techniques, start: Techniques, climbed: list[Step], fits: Callable[[Techniques], bool]
) -> Techniques:
    """`techniques` with amounts turned down as far as they go, less the rungs that are then not needed."""
    fields = {step.field for step in climbed}
    if "streamed_layers" in fields and techniques.streamed_layers:
        fewest = least(lambda n: fits(replace(techniques, streamed_layers=n)), 1, techniques.streamed_layers)
        techniques = replace(techniques, streamed_layers=fewest)
    if "head_groups" in fields and techniques.head_groups > 1:
        counts = [n for n in range(2, techniques.head_groups) if techniques.head_groups % n == 0]
        fewer = next((n for n in counts if fits(replace(techniques, head_groups=n))), techniques.head_groups)
        techniques = replace(techniques, head_groups=fewer)
    for step in reversed(climbed[:-1]):
        without = replace(techniques, **{step.field: getattr(start, step.field)})
        if step.field != "recomputed_layers" and fits(without):
            techniques = without
    if "recomputed_layers" in fields and not techniques.streamed_layers:
        fewest = least(lambda n: fits(replace(techniques, recomputed_layers=n)), 0, techniques.recomputed_layers)
        techniques = replace(techniques, recomputed_layers=fewest)
    return techniques


def least(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The smallest n in low..high for which `holds`, which it does at `high` and from some n on."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def most(holds: Callable[[int], bool], high: int) -> int:
    """The largest n in 1..high for which `holds`, which it does up to some n; 0 for none."""
    return least(lambda n: n > high or not holds(n), 1, high + 1) - 1


def _divisors(number: int) -> list[int]:
    return [n for n in range(number - 1, 0, -1) if number % n == 0]
