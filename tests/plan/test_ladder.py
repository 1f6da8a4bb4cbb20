"""The ladder: climbed no further than the budget asks, and taken as the recipe says."""

from dataclasses import replace

import pytest
from conftest import tiny_config
from real_steps import recipe_for

from qtune.memory.techniques import Techniques
from qtune.plan import ladder
from qtune.plan.fake_step import Batch
from qtune.plan.forecast import Forecaster
from qtune.plan.ladder import MARGIN_FRACTION, STEPS, Budget, Climb
from qtune.plan.max_context import longest
from qtune.plan.rung_report import SHOWN, Rung, rungs
from qtune.plan.workload import Work

LAYERS, TOKENS, ROOMY = 3, 1500, 1 << 40
CLIMBED = STEPS[:-1]
WORK = Work((Batch((TOKENS,), labelled=TOKENS // 4),))  # with labels on all, the loss would be the peak
CONFIG = tiny_config(num_hidden_layers=LAYERS, intermediate_size=384)
RECIPE = recipe_for("demo")


@pytest.fixture(scope="module")
def forecaster() -> Forecaster:
    return Forecaster(CONFIG, RECIPE, "float32", False, 0)


@pytest.fixture(scope="module")
def heights(forecaster: Forecaster) -> list[int]:
    """Device bytes with nothing, and with every rung up to each in turn: each is less than the one before.

    But for the last rung, which stands in for the one before it where the host has no room.
    """
    techniques, found = Techniques(), []
    for step in (None, *CLIMBED):
        techniques = step.up(techniques, forecaster) if step else techniques
        found.append(forecaster.forecast(techniques, WORK.heaviest(1)).needed_bytes)
    assert found == sorted(set(found), reverse=True)
    return found


def climbed(forecaster: Forecaster, device_bytes: float, host_bytes: int = ROOMY, **memory: object) -> Climb:
    recipe = recipe_for("demo", memory)
    return ladder.climb(recipe, forecaster, WORK, Budget(round(device_bytes / (1 - MARGIN_FRACTION)) + 2, host_bytes))


def highest(climb: Climb) -> int:
    """Number of the highest rung that is on; 0 for none."""
    on = climb.techniques

    def is_on(step: ladder.Step) -> bool:
        if step.name == "smaller tiles":
            return 0 < on.tile_tokens <= ladder.SMALL_TILE_TOKENS
        return step.is_on(on)

    return max((i + 1 for i, step in enumerate(STEPS) if is_on(step)), default=0)


@pytest.mark.parametrize("rung", range(len(CLIMBED) + 1), ids=["nothing", *(step.name for step in CLIMBED)])
def test_each_rung_is_where_some_budget_ends(forecaster: Forecaster, heights: list[int], rung: int) -> None:
    """A budget that this rung just meets is met with it, and with nothing above."""
    climb = climbed(forecaster, heights[rung])
    assert climb.fits
    assert highest(climb) == rung
    assert climb.forecast.needed_bytes <= heights[rung]
    assert climb.forecast.device_bytes == forecaster.forecast(climb.techniques, WORK.heaviest(1)).device_bytes


def test_what_a_run_needs_without_any_batch_is_never_more_than_with_one(forecaster: Forecaster) -> None:
    for techniques in (Techniques(), Techniques(LAYERS, True, 256, True, "host", LAYERS, 2)):
        needed = forecaster.forecast(techniques, Batch.of_one_document(64)).needed_bytes
        assert 0 < forecaster.least_bytes(techniques) <= needed


def test_where_no_batch_has_room_none_is_traced() -> None:
    fresh = Forecaster(CONFIG, RECIPE, "float32", False, 0)
    least = fresh.least_bytes(Techniques(LAYERS, True, 256, True, "host", LAYERS, 2))
    budgets = [Budget(round(least * share / (1 - MARGIN_FRACTION)), ROOMY) for share in (0.99, 1.01)]
    assert [ladder.has_no_room(RECIPE, fresh, budget) for budget in budgets] == [True, False]
    assert longest(RECIPE, fresh, budgets[0]).tokens == 0
    assert not fresh._traces


def test_more_memory_never_climbs_higher(forecaster: Forecaster, heights: list[int]) -> None:
    least, most = heights[-1], heights[0]
    budgets = [least + (most - least) * i / 5 for i in range(-1, 7)]
    found = [climbed(forecaster, budget) for budget in budgets]
    assert [climb.fits for climb in found] == [False] + [True] * 7
    numbers = [highest(climb) for climb in found]
    assert numbers == sorted(numbers, reverse=True)
    recomputed = [climb.techniques.recomputed_layers for climb in found]
    assert recomputed == sorted(recomputed, reverse=True)


def test_amounts_are_turned_down_as_far_as_they_go(forecaster: Forecaster, heights: list[int]) -> None:
    for budget in (heights[1] + 1, (heights[0] + heights[1]) / 2, heights[6] + 1):
        climb = climbed(forecaster, budget)
        on = climb.techniques
        fewer = []
        if on.recomputed_layers and not on.streamed_layers:
            fewer.append(replace(on, recomputed_layers=on.recomputed_layers - 1))
        if on.streamed_layers > 1:
            fewer.append(replace(on, streamed_layers=on.streamed_layers - 1))
        assert climb.fits
        assert fewer
        for less in fewer:
            assert forecaster.forecast(less, WORK.heaviest(1)).needed_bytes > budget + 3


def told(forecaster: Forecaster, climb: Climb, weighs_all: bool = True, **memory: object) -> list[Rung]:
    return list(rungs(recipe_for("demo", memory), forecaster, WORK, climb, weighs_all))


def test_a_rung_says_what_it_does_here(forecaster: Forecaster, heights: list[int]) -> None:
    settled = {"stream_layers": LAYERS, "checkpoints": "host", "embedding": "host", "head": "nf4"}
    climb = climbed(forecaster, heights[-1], **settled)
    found = told(forecaster, climb, **settled)
    assert [rung.setting for rung in found] == [step.key for step in SHOWN]
    for step, rung in zip(SHOWN, found, strict=True):
        without = replace(climb.techniques, **{step.field: getattr(Techniques(), step.field)})
        if rung.is_on and step.field != "recomputed_layers":
            before = forecaster.forecast(without, WORK.heaviest(1))
            assert rung.saved_bytes == before.device_bytes - climb.forecast.device_bytes
            assert rung.host_bytes == climb.forecast.host_bytes - before.host_bytes
            assert rung.cost_fraction > 0
    none = told(forecaster, climbed(forecaster, heights[0]))
    assert not any(rung.is_on for rung in none)
    assert none[0].saved_bytes == heights[0] - heights[1]


def test_what_a_rung_that_is_off_would_do_is_told_if_asked(heights: list[int]) -> None:
    """Two thirds of a plan's time once went into it, also where nobody was to see it."""
    fresh = Forecaster(CONFIG, RECIPE, "float32", False, 0)
    climb = climbed(fresh, heights[1])
    before = len(fresh._traces)
    found = told(fresh, climb, weighs_all=False)
    assert len(fresh._traces) == before
    for rung in found:
        assert (rung.saved_bytes is None, rung.host_bytes is None) == (not rung.is_on, not rung.is_on)
    assert all(rung.saved_bytes is not None for rung in told(fresh, climb))


def test_the_host_is_never_asked_for_more_than_it_has(forecaster: Forecaster, heights: list[int]) -> None:
    heaviest = WORK.heaviest(1)
    undo = forecaster.host_parts(Techniques(), heaviest)["undo copy of the adapter"]
    a_layer = forecaster.host_parts(Techniques(streamed_layers=1), heaviest)["streamed layers"]
    for host_bytes in (undo, undo + 2 * a_layer, undo + 4 * TOKENS * 64 * LAYERS + a_layer):
        climb = climbed(forecaster, heights[-1], host_bytes)
        assert climb.forecast.host_bytes <= host_bytes
        assert (climb.forecast.host_bytes > undo) == (host_bytes > undo)
        for rung in ladder.reserve(RECIPE, forecaster, Techniques(), heaviest, Budget(heights[-1], host_bytes)):
            assert forecaster.forecast(rung.techniques, heaviest).host_bytes <= host_bytes


@pytest.mark.parametrize(
    "memory",
    [
        {"keep_layers": 2},
        {"keep_layers": LAYERS, "tile_tokens": 0},
        {"tile_tokens": 256, "head_groups": 2, "stream_layers": 2},
        {"checkpoints": "host", "head": "nf4", "embedding": "host", "head_groups": 1},
        {"embedding": "host", "head": "host"},
        {"head": "16bit"},
    ],
)
def test_what_the_recipe_settles_stays_settled(forecaster: Forecaster, heights: list[int], memory: dict) -> None:
    """Streaming once recomputed the layers that memory.keep_layers was to keep."""
    on = climbed(forecaster, heights[-1] / 2, **memory).techniques
    settled = {
        "keep_layers": LAYERS - on.recomputed_layers,
        "checkpoints": "host" if on.host_checkpoints else "device",
        "tile_tokens": on.tile_tokens,
        "embedding": "host" if on.host_embedding else "device",
        "head": {"device": "16bit"}.get(on.head, on.head),
        "stream_layers": on.streamed_layers,
        "head_groups": on.head_groups,
    }
    assert {key: settled[key] for key in memory} == memory


def test_the_head_is_rounded_only_where_the_host_has_no_room_for_it(forecaster: Forecaster) -> None:
    heaviest, settled = WORK.heaviest(1), {"embedding": "device", "checkpoints": "device", "stream_layers": 0}
    recipe = recipe_for("demo", settled)
    undo = forecaster.host_parts(Techniques(), heaviest)["undo copy of the adapter"]
    table = 262 * 64 * 4
    for host_bytes, head in ((undo + table, "host"), (undo + table - 1, "nf4")):
        first, *_ = ladder.tops(recipe, forecaster, heaviest, host_bytes)
        assert first.head == head


def test_a_rung_that_a_kept_layer_rules_out_says_so(forecaster: Forecaster, heights: list[int]) -> None:
    found = told(forecaster, climbed(forecaster, heights[-1], keep_layers=2), keep_layers=2)
    assert {rung.setting: rung for rung in found}[
        "stream_layers"
    ].note == "refused: a streamed layer is recomputed, and memory.keep_layers = 2"


@pytest.mark.parametrize("memory", [{}, {"keep_layers": 0}, {"stream_layers": 2}, {"keep_layers": 1}])
def test_the_micro_batch_is_split_before_a_run_is_refused(memory: dict) -> None:
    """It was once split only where recomputation was the plan's to choose."""
    recipe = recipe_for("demo", memory, micro_batch=6, gradient_accumulation=1)
    forecaster = Forecaster(tiny_config(), recipe, "float32", False, 0)
    work = Work(tuple(Batch.of_one_document(200) for _ in range(8)))
    start = ladder.forced(recipe, forecaster)
    techniques = start if memory else Techniques(2)
    needed = forecaster.forecast(techniques, work.heaviest(3)).needed_bytes
    climb = ladder.climb(recipe, forecaster, work, Budget(round(needed / (1 - MARGIN_FRACTION)) + 2, ROOMY))
    assert climb.fits
    assert climb.micro_batch == 3
    assert climb.techniques == techniques


def test_rungs_above_the_plan_are_held_in_reserve(forecaster: Forecaster) -> None:
    found = ladder.reserve(RECIPE, forecaster, Techniques(1, True), WORK.heaviest(1), Budget(ROOMY, ROOMY))
    assert [rung.name for rung in found] == [step.name for step in CLIMBED if step.field != "host_checkpoints"]
    assert found[0].techniques == Techniques(LAYERS, True)
    assert found[-1].techniques == Techniques(LAYERS, True, ladder.SMALL_TILE_TOKENS, True, "host", LAYERS, 2)
