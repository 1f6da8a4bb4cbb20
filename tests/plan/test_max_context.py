"""The longest context, held against a search over every plan that the ladder has."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
from conftest import tiny_config
from real_steps import recipe_for

from qtune.memory.techniques import Techniques
from qtune.memory.techniques.output_head import HEADS
from qtune.plan import activation_memory
from qtune.plan.forecast import Forecaster
from qtune.plan.ladder import MARGIN_FRACTION, Budget, Ladder
from qtune.plan.max_context import EXACT_FRACTION, STEP_TOKENS, Bound, Lines, longest
from qtune.plan.workload import Work

LAYERS, CONTEXT, MIB = 24, 500 << 20, 1 << 20
CONFIG = tiny_config(
    num_hidden_layers=LAYERS,
    vocab_size=16_000,
    hidden_size=256,
    intermediate_size=1024,
    num_attention_heads=8,
    num_key_value_heads=4,
)
SETTLED = {"tile_tokens": 256, "head_groups": 1}  # of what costs the host nothing, so that the search is short
RECIPE = recipe_for("demo", SETTLED, gradient_accumulation=1)
EVERYTHING = Budget(1 << 60, 1 << 60)


@pytest.fixture(scope="module")
def exact() -> Forecaster:
    return activation_memory.forecaster(CONFIG, RECIPE, "bfloat16", (8, 6), CONTEXT)


@pytest.fixture(scope="module")
def lines(exact: Forecaster) -> Forecaster:
    return replace(exact, passes=Lines(exact.passes))


def on(forecaster: Forecaster, tokens: int, budget: Budget = EVERYTHING) -> Ladder:
    return Ladder(forecaster, Work.of_full_sequences(tokens), budget)


def every_plan() -> Iterator[Techniques]:
    """Whatever can be on, in every amount of layers; attention is run again in all, as to keep it holds more."""
    amounts = [(n, 0) for n in range(LAYERS + 1)] + [(LAYERS, n) for n in range(1, LAYERS + 1)]
    for on_host, embedding, head in itertools.product((False, True), (False, True), HEADS):
        for recomputed, streamed in amounts:
            yield Techniques(recomputed, on_host, 256, embedding, head, streamed, 1, LAYERS)


def any_plan_fits(exact: Forecaster, lines: Forecaster, budget: Budget, tokens: int) -> bool:
    """Beyond the lengths that were traced a line is too low, so a plan that fits by it is traced."""
    by_line = (plan for plan in every_plan() if budget.has_room_for(on(lines, tokens).forecast(plan)))
    return any(budget.has_room_for(on(exact, tokens).forecast(plan)) for plan in by_line)


@pytest.mark.parametrize(
    ("device_mib", "host_mib", "bound"),
    [
        pytest.param(650, 100, "host", marks=pytest.mark.long),
        pytest.param(650, 4000, "card", marks=pytest.mark.long),
        pytest.param(700, 80, "both", marks=pytest.mark.long),
        pytest.param(650, 90, "host", marks=pytest.mark.long),  # with a layer that is not recomputed, or it is 6,848
        pytest.param(1200, 100, "card", marks=pytest.mark.long),
    ],
)
def test_no_plan_goes_further(
    exact: Forecaster, lines: Forecaster, device_mib: int, host_mib: int, bound: Bound
) -> None:
    """It once was how far the topmost rung goes, which keeps in host memory what a larger card holds."""
    budget = Budget(device_mib * MIB, host_mib * MIB)
    furthest = longest(exact, budget)
    further = round((1 + EXACT_FRACTION) * furthest.tokens) + STEP_TOKENS
    assert furthest.tokens > 1000
    assert on(exact, furthest.tokens, budget).climb().fits
    assert not any_plan_fits(exact, lines, budget, further)
    assert furthest.bound == bound


def test_a_short_one_is_found_where_tiles_grow_with_the_tokens(exact: Forecaster) -> None:
    """It was looked for on a line through long ones, by which nothing fitted where the loss's first tile was small."""
    on_device = {"checkpoints": "device", "embedding": "device", "head": "16bit", "stream_layers": 0}
    leanest = replace(exact, recipe=recipe_for("demo", SETTLED | on_device, gradient_accumulation=1))
    everything = Techniques(LAYERS, tile_tokens=256, head_groups=1, recomputed_attention=LAYERS)
    needed = on(leanest, 320).forecast(everything).needed_bytes
    budget = Budget(round(needed / (1 - MARGIN_FRACTION)) + 2, 1 << 40)
    assert longest(leanest, budget).tokens == 320


@pytest.mark.long
def test_the_climb_finds_a_plan_wherever_there_is_one(exact: Forecaster, lines: Forecaster) -> None:
    """Checkpoints in host memory were once in the way of weights there: what a low rung keeps, no higher one gets."""
    tokens = 4096
    forecasts = [on(lines, tokens).forecast(plan) for plan in every_plan()]
    for host_mib in range(20, 90, 8):
        least = min(each.needed_bytes for each in forecasts if each.host_bytes <= host_mib * MIB)
        budget = Budget(round(least / (1 - MARGIN_FRACTION)) + 2, host_mib * MIB)
        assert on(exact, tokens, budget).climb().fits, host_mib
