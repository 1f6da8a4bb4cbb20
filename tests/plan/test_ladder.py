"""The ladder: climbed no further than the budget asks, taken as the recipe says. By arithmetic, but for one model."""

from dataclasses import replace

import pytest
from arithmetic import CHECKPOINT, KEPT, LAYERS, ROOMY, STANDING, TABLE, FormulaPasses, ladder_of
from conftest import tiny_config
from real_steps import recipe_for

from qtune.errors import ModelError
from qtune.memory.techniques import STEPS, TECHNIQUES, Step, Techniques
from qtune.memory.techniques.sharded_layers import EXCHANGES, SHARE_BEHIND, cost
from qtune.memory.techniques.tiled_mlp import SMALL_TILE_TOKENS
from qtune.plan import activation_memory
from qtune.plan.forecast import Forecaster
from qtune.plan.ladder import MARGIN_FRACTION, Budget, Climb, Ladder
from qtune.plan.max_context import STEP_TOKENS, longest
from qtune.plan.overrides import refuse_impossible
from qtune.plan.rung_report import SHOWN, Rung, rungs
from qtune.plan.workload import BatchShape, Work

TOKENS, REAL_LAYERS = 1500, 3
OF_ONE = [step for step in STEPS if not TECHNIQUES[step.technique].needs_ranks]
CLIMBED = OF_ONE[:-1]
WORK = Work((BatchShape((TOKENS,), labelled=TOKENS // 4),))  # with labels on all, the loss would be the peak
EVERYTHING = Techniques(LAYERS, True, 256, True, "host", LAYERS, 2, LAYERS)
UNDO = STANDING.adapter_bytes + STANDING.optimizer_bytes


def within(device_bytes: float, host_bytes: int = ROOMY) -> Budget:
    """A budget that a forecast of so many bytes just meets."""
    return Budget(round(device_bytes / (1 - MARGIN_FRACTION)) + 2, host_bytes)


def climbed(device_bytes: float, host_bytes: int = ROOMY, **memory: object) -> Climb:
    return ladder_of(WORK, within(device_bytes, host_bytes), memory).climb()


def heights_of(ladder: Ladder) -> list[int]:
    """Device bytes with nothing, and with every rung up to each in turn.

    But for the last rung, which stands in for the one before it where the host has no room.
    """
    techniques = Techniques()
    heights = [ladder.forecast(techniques).needed_bytes]
    for step in CLIMBED:
        techniques = step.up(techniques, ladder.standing)
        heights.append(ladder.forecast(techniques).needed_bytes)
    return heights


HEIGHTS = heights_of(ladder_of(WORK))


@pytest.fixture(scope="module")
def traced() -> Forecaster:
    config = tiny_config(num_hidden_layers=REAL_LAYERS, intermediate_size=384)
    return activation_memory.forecaster(config, recipe_for("demo"), "float32", None, 0)


def highest(climb: Climb) -> int:
    """Number of the highest rung that is on; 0 for none."""
    on = climb.techniques

    def is_on(step: Step) -> bool:
        if step.name == "smaller tiles":
            return 0 < on.tile_tokens <= SMALL_TILE_TOKENS
        return step.is_on(on)

    return max((i + 1 for i, step in enumerate(OF_ONE) if is_on(step)), default=0)


@pytest.mark.long
def test_each_rung_of_a_real_model_holds_less_than_the_one_before(traced: Forecaster) -> None:
    heights = heights_of(Ladder(traced, WORK, Budget(ROOMY, ROOMY)))
    assert heights == sorted(set(heights), reverse=True)
    for rung in (0, 1, len(CLIMBED)):
        climb = Ladder(traced, WORK, within(heights[rung])).climb()
        assert climb.fits
        assert highest(climb) == rung


@pytest.mark.parametrize("rung", range(len(CLIMBED) + 1), ids=["nothing", *(step.name for step in CLIMBED)])
def test_each_rung_is_where_some_budget_ends(rung: int) -> None:
    """A budget that this rung just meets is met with it, and with nothing above."""
    assert sorted(set(HEIGHTS), reverse=True) == HEIGHTS
    climb = climbed(HEIGHTS[rung])
    assert climb.fits
    assert highest(climb) == rung
    assert climb.forecast.needed_bytes <= HEIGHTS[rung]
    assert climb.forecast == ladder_of(WORK).forecast(climb.techniques)


def test_what_a_run_needs_without_any_batch_is_never_more_than_with_one(traced: Forecaster) -> None:
    for techniques in (Techniques(), Techniques(REAL_LAYERS, True, 256, True, "host", REAL_LAYERS, 2)):
        needed = traced.forecast(techniques, BatchShape.of_one_document(64)).needed_bytes
        assert 0 < traced.least_bytes(techniques) <= needed


def test_where_no_batch_has_room_none_is_asked_about() -> None:
    least = ladder_of(WORK).forecaster.least_bytes(EVERYTHING)
    tight, enough = (
        ladder_of(WORK, Budget(round(least * share / (1 - MARGIN_FRACTION)), ROOMY)) for share in (0.99, 1.01)
    )
    assert [tight.has_no_room(), enough.has_no_room()] == [True, False]
    assert longest(tight.forecaster, tight.budget).tokens == 0
    assert tight.forecaster.passes.asked == 0


@pytest.mark.parametrize(("tokens", "host_bytes"), [(1024, ROOMY), (6400, ROOMY), (6400, UNDO)])
def test_the_longest_context_is_the_last_that_fits(tokens: int, host_bytes: int) -> None:
    """Held against every length, one by one."""

    def at(tokens: int, budget: Budget) -> Ladder:
        return ladder_of(Work.of_full_sequences(tokens), budget, gradient_accumulation=1)

    leanest = at(tokens, Budget(ROOMY, host_bytes)).tops(BatchShape.of_one_document(tokens))
    budget = within(min(at(tokens, Budget(ROOMY, ROOMY)).forecast(top).needed_bytes for top in leanest), host_bytes)
    furthest = longest(at(tokens, budget).forecaster, budget)
    fitting = [n for n in range(STEP_TOKENS, 3 * tokens, STEP_TOKENS) if at(n, budget).climb().fits]
    assert furthest.tokens == fitting[-1] >= tokens
    assert furthest.bound in ("card", "host", "both")


def test_more_memory_never_climbs_higher() -> None:
    least, most = HEIGHTS[-1], HEIGHTS[0]
    climbs = [climbed(least + (most - least) * i / 40) for i in range(-1, 42)]
    assert [climb.fits for climb in climbs] == [False] + [True] * 42
    of_attention = 1 + [step.technique for step in OF_ONE].index("recomputed_attention")
    numbers = [1 if highest(climb) == of_attention else highest(climb) for climb in climbs]  # layers against attention
    assert numbers == sorted(numbers, reverse=True)
    low = [climb for climb, number in zip(climbs, numbers, strict=True) if number == 1]
    costs = [sum(rung.cost_fraction for rung in told(climb, weighs_all=False) if rung.is_on) for climb in low]
    assert costs == sorted(costs, reverse=True)
    recomputed = [climb.techniques.recomputed_layers for climb in climbs]
    assert recomputed == sorted(recomputed, reverse=True)


def test_amounts_are_turned_down_as_far_as_they_go() -> None:
    for budget in (HEIGHTS[1] + 1, (HEIGHTS[0] + HEIGHTS[1]) / 2, HEIGHTS[5] + 1, HEIGHTS[6] + 1):
        climb = climbed(budget)
        on = climb.techniques
        fewer = []
        if on.recomputed_layers and not on.streamed_layers:
            fewer.append(replace(on, recomputed_layers=on.recomputed_layers - 1))
        if on.streamed_layers > 1:
            fewer.append(replace(on, streamed_layers=on.streamed_layers - 1))
        assert climb.fits
        for less in fewer:
            assert ladder_of(WORK).forecast(less).needed_bytes > budget + 3


def room_for(layers: int, tokens: int) -> Climb:
    """A plan for one document of so many tokens where every layer is recomputed, and so many can keep attention."""
    ladder = ladder_of(Work.of_full_sequences(tokens))
    enough = Techniques(LAYERS, recomputed_attention=LAYERS - layers)
    return replace(ladder, budget=within(ladder.forecast(enough).needed_bytes)).climb()


@pytest.mark.parametrize(("documents", "keeps"), [((8,) * 200, "a layer"), ((1600,), "attention")])
def test_room_for_a_layer_is_spent_on_attention_where_documents_are_long(documents: tuple, keeps: str) -> None:
    """What attention does grows with the document, what keeping it takes does not."""
    ladder = ladder_of(Work((BatchShape(documents, labelled=100),)))
    one_kept = Techniques(LAYERS - 1, recomputed_attention=LAYERS - 1)
    climb = replace(ladder, budget=within(ladder.forecast(one_kept).needed_bytes)).climb()
    assert climb.techniques == (one_kept if keeps == "a layer" else Techniques(LAYERS))


@pytest.mark.parametrize("kept", range(LAYERS + 1))
def test_attention_is_kept_in_as_many_layers_as_there_is_room_for(kept: int) -> None:
    climb = room_for(kept, 1500)
    assert (climb.techniques.recomputed_layers, climb.techniques.recomputed_attention) == (LAYERS, LAYERS - kept)
    attention = next(rung for rung in told(climb) if rung.setting == "keep_attention")
    assert attention.is_on == (kept < LAYERS)
    if attention.is_on:
        assert attention.saved_bytes == (LAYERS - kept) * KEPT * 1500


def test_attention_of_which_nothing_can_be_kept_runs_again() -> None:
    """Math attention, which returns no sums: nothing is saved, and a plan must not say so."""
    ladder = ladder_of(WORK, within(ladder_of(WORK).forecast(Techniques(LAYERS)).needed_bytes))
    assert ladder.climb().techniques == Techniques(LAYERS)
    by_math = replace(ladder, forecaster=replace(ladder.forecaster, passes=FormulaPasses(kept=0)))
    on = by_math.climb().techniques
    assert on.recomputed_attention == on.recomputed_layers > 0


def told(climb: Climb, weighs_all: bool = True, ladder: Ladder | None = None, **memory: object) -> list[Rung]:
    return list(rungs(ladder or ladder_of(WORK, memory=memory), climb, weighs_all))


def test_a_rung_says_what_it_does_here() -> None:
    settled = {"stream_layers": LAYERS, "checkpoints": "host", "embedding": "host", "head": "nf4"}
    climb = climbed(HEIGHTS[-1], **settled)
    report, shown = told(climb, **settled), [step for step in SHOWN if step in OF_ONE]
    assert [rung.setting for rung in report] == [step.key for step in shown]
    for step, rung in zip(shown, report, strict=True):
        without = replace(climb.techniques, **{step.technique: TECHNIQUES[step.technique].off})
        if rung.is_on and step.technique != "recomputed_layers":
            before = ladder_of(WORK).forecast(without)
            assert rung.saved_bytes == before.device_bytes - climb.forecast.device_bytes
            assert rung.host_bytes == climb.forecast.host_bytes - before.host_bytes
            assert rung.cost_fraction > 0
    none = told(climbed(HEIGHTS[0]))
    assert not any(rung.is_on for rung in none)
    assert none[0].saved_bytes == HEIGHTS[0] - HEIGHTS[1]


def test_what_a_rung_that_is_off_would_do_is_told_if_asked() -> None:
    """Two thirds of a plan's time once went into it, also where nobody was to see it."""
    ladder = ladder_of(WORK, within(HEIGHTS[1]))
    climb = ladder.climb()
    before = ladder.forecaster.passes.asked
    report = told(climb, weighs_all=False, ladder=ladder)
    assert ladder.forecaster.passes.asked == before + 1  # the rung that is on, without it
    for rung in report:
        assert (rung.saved_bytes is None, rung.host_bytes is None) == (not rung.is_on, not rung.is_on)
    assert all(rung.saved_bytes is not None for rung in told(climb))


def test_the_host_is_never_asked_for_more_than_it_has() -> None:
    a_layer = 90 * 1024
    for host_bytes in (UNDO, UNDO + 2 * a_layer, UNDO + CHECKPOINT * TOKENS * LAYERS + a_layer):
        climb = climbed(HEIGHTS[-1], host_bytes)
        assert climb.forecast.host_bytes <= host_bytes
        assert (climb.forecast.host_bytes > UNDO) == (host_bytes > UNDO)
        ladder = ladder_of(WORK, within(HEIGHTS[-1], host_bytes))
        for rung in ladder.reserve(ladder.stay(Techniques(), 1)):
            assert ladder.forecast(rung.techniques).host_bytes <= host_bytes


@pytest.mark.parametrize(
    "memory",
    [
        {"keep_layers": 2},
        {"keep_layers": 1, "keep_attention": 3},
        {"keep_attention": 0, "stream_layers": 0},
        {"keep_layers": LAYERS, "tile_tokens": 0},
        {"tile_tokens": 256, "head_groups": 2, "stream_layers": 2},
        {"checkpoints": "host", "head": "nf4", "embedding": "host", "head_groups": 1},
        {"embedding": "host", "head": "host"},
        {"head": "16bit"},
    ],
)
def test_what_the_recipe_settles_stays_settled(memory: dict) -> None:
    """Streaming once recomputed the layers that memory.keep_layers was to keep."""
    on = climbed(HEIGHTS[-1] / 2, **memory).techniques
    settled = {
        "keep_layers": LAYERS - on.recomputed_layers,
        "keep_attention": LAYERS - on.recomputed_attention,
        "checkpoints": "host" if on.host_checkpoints else "device",
        "tile_tokens": on.tile_tokens,
        "embedding": "host" if on.host_embedding else "device",
        "head": {"device": "16bit"}.get(on.head, on.head),
        "stream_layers": on.streamed_layers,
        "head_groups": on.head_groups,
    }
    assert {key: settled[key] for key in memory} == memory


def test_the_head_is_rounded_only_where_the_host_has_no_room_for_it() -> None:
    settled = {"embedding": "device", "checkpoints": "device", "stream_layers": 0}
    for host_bytes, head in ((UNDO + TABLE, "host"), (UNDO + TABLE - 1, "nf4")):
        first, *_ = ladder_of(WORK, Budget(ROOMY, host_bytes), settled).tops(WORK.heaviest(1))
        assert first.head == head


def test_a_tied_table_stays_for_whoever_still_reads_it() -> None:
    tied = replace(STANDING, is_tied=True, embedding_bytes=0)

    def tables(**on: object) -> tuple[int, int]:
        techniques = Techniques(**on)
        parts, host = techniques.on_device(tied), techniques.on_host(tied)
        return parts["embedding"] + parts["head"], host.get("embedding", 0) + host.get("head", 0)

    assert tables() == (TABLE, 0)
    assert tables(host_embedding=True) == (TABLE, TABLE)
    assert tables(head="nf4") == (TABLE + TABLE // 4, 0)
    assert tables(head="nf4", host_embedding=True) == (TABLE // 4, TABLE)
    assert tables(head="host") == (0, TABLE)
    assert tables(head="host", host_embedding=True) == (0, TABLE)


def test_a_rung_that_a_kept_layer_rules_out_says_so() -> None:
    report = told(climbed(HEIGHTS[-1], keep_layers=2), keep_layers=2)
    (streaming,) = (rung for rung in report if rung.setting == "stream_layers")
    assert streaming.note == "refused: a streamed layer is recomputed, and memory.keep_layers = 2"


def test_a_rung_that_the_model_refuses_is_left_out() -> None:
    refusing = replace(STANDING, refusals={"streamed_layers": "it may not"})
    ladder = ladder_of(WORK, within(HEIGHTS[-1]), standing=refusing)
    assert ladder.climb().techniques.streamed_layers == 0
    assert "streamed layers" not in [rung.name for rung in ladder.reserve(ladder.climb())]


@pytest.mark.parametrize("memory", [{}, {"keep_layers": 0}, {"stream_layers": 2}, {"keep_layers": 1}])
def test_the_micro_batch_is_split_before_a_run_is_refused(memory: dict) -> None:
    """It was once split only where recomputation was the plan's to choose."""
    work = Work(tuple(BatchShape.of_one_document(200) for _ in range(8)))
    ladder = ladder_of(work, memory=memory, micro_batch=6, gradient_accumulation=1)
    techniques = ladder.foot if memory else Techniques(LAYERS)
    needed = ladder.forecast(techniques, 3).needed_bytes
    climb = replace(ladder, budget=within(needed)).climb()
    assert climb.fits
    assert climb.micro_batch == 3
    assert climb.techniques == techniques


def test_rungs_above_the_plan_are_held_in_reserve() -> None:
    ladder = ladder_of(WORK)
    reserve = ladder.reserve(ladder.stay(Techniques(1, True), 1))
    assert [rung.name for rung in reserve] == [step.name for step in CLIMBED if step.technique != "host_checkpoints"]
    assert reserve[0].techniques == Techniques(LAYERS, True)
    assert reserve[-1].techniques == Techniques(LAYERS, True, SMALL_TILE_TOKENS, True, "host", LAYERS, 2, LAYERS)


def ladder_of_ranks(ranks: int, budget: Budget, memory: dict[str, object] | None = None) -> Ladder:
    ladder = ladder_of(WORK, budget, memory)
    return replace(ladder, forecaster=replace(ladder.forecaster, standing=replace(STANDING, ranks=ranks)))


def test_of_several_ranks_layers_are_in_parts_before_they_are_streamed() -> None:
    ladder = ladder_of_ranks(4, within(ROOMY))
    lean = Techniques(LAYERS, True, 1024, True, recomputed_attention=LAYERS)
    in_parts = ladder.forecast(lean.having(sharded_layers=LAYERS))
    part = sum(in_parts.device[name] for name in ("base", "sharded layers"))
    rest = STANDING.base_bytes - sum(layer.resident_bytes for layer in STANDING.layers)
    assert part <= rest + 0.27 * sum(layer.resident_bytes for layer in STANDING.layers)
    climb = replace(ladder, budget=within(in_parts.needed_bytes)).climb()
    assert climb.fits
    assert (climb.techniques.sharded_layers, climb.techniques.streamed_layers) == (LAYERS, 0)
    told = {rung.name: rung for rung in rungs(ladder, climb, weighs_all=False)}
    assert told[f"sharded layers, {LAYERS} of {LAYERS} in 4 parts"].is_on


def test_layers_in_parts_on_the_host_take_a_part_of_it() -> None:
    ladder = ladder_of_ranks(4, within(ROOMY))
    streamed = Techniques(LAYERS, streamed_layers=LAYERS)
    whole, parts = (
        each.on_host(ladder.standing)["streamed layers"] for each in (streamed, streamed.having(sharded_layers=LAYERS))
    )
    assert parts <= 0.27 * whole


def test_one_process_has_no_parts() -> None:
    climb = climbed(HEIGHTS[-1])
    assert climb.techniques.sharded_layers == 0
    assert not any(rung.name.startswith("sharded") for rung in rungs(ladder_of(WORK), climb, weighs_all=True))
    with pytest.raises(ModelError, match=r"memory\.shard_layers = 2 needs more than one rank"):
        refuse_impossible(ladder_of(WORK, memory={"shard_layers": 2}).forecaster, WORK.heaviest(1), ROOMY)


def test_what_parts_cost_follows_from_the_link() -> None:
    """Exchanged behind the arithmetic they are nearly free; a slow link is what is waited for."""
    on, size = Techniques(LAYERS, sharded_layers=LAYERS), sum(layer.packed_bytes for layer in STANDING.layers)
    known = replace(STANDING, ranks=2, pass_seconds=1.0)
    assert cost(on, replace(known, link_bytes=size)) == SHARE_BEHIND  # twice the half, in the time of the pass
    assert cost(on, replace(known, link_bytes=size / 4)) == pytest.approx(SHARE_BEHIND + 3)
    assert cost(on, replace(STANDING, ranks=2)) == EXCHANGES


def test_what_all_ranks_have_to_climb_at_once_is_in_no_reserve() -> None:
    """A rank that streamed a layer by itself would wait for parts that nobody hands out."""
    ladder = ladder_of_ranks(2, within(ROOMY))
    for techniques, is_streamed in ((Techniques(LAYERS), True), (Techniques(LAYERS, sharded_layers=2), False)):
        reserve = ladder.reserve(ladder.stay(techniques, 1))
        assert any(rung.techniques.streamed_layers for rung in reserve) == is_streamed
        assert {rung.techniques.sharded_layers for rung in reserve} == {techniques.sharded_layers}
