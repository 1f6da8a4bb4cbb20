"""Forecast beside measured: shapes and cards, lengths, the least that a model takes, and the longest context."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from profile_memory import Stage

from qtune.memory.techniques import Techniques
from qtune.plan.forecast import Forecaster
from qtune.plan.ladder import Budget
from qtune.plan.max_context import longest
from qtune.plan.workload import BatchShape
from qtune.recipe.schema import HOST_FRACTION, Memory
from qtune.units import GIB

from .lab import (
    PLAIN,
    Figures,
    Lab,
    beside,
    everything,
    let_memory_go,
    limited_to,
    on,
    one_document,
    recipe_of,
    recomputed,
)

TOKENS = 2048
CARDS_GIB = (48, 24, 16, 12, 8, 6)  # the largest first: what is on stays on, so that one model serves several cards
SMALL = {"smollm2_135m": 30, "llama_1b": 16, "qwen3_4b": 36, "gemma3_4b": 34}
LARGE = {"mistral_7b": 32, "llama_8b": 32, "qwen3_14b": 20, "qwen3_30b_a3b": 12}  # layers, of the last two not all
LENGTHS = (512, 2048, 8192, 32768)
PLANNED_CARD_GIB = 12
SLOWEST_PROBE_SECONDS = 30
OPERATIONS_ASSUMED = 300e12  # to leave out a probe that would take minutes


def forecast_rows(lab: Lab, shapes: dict[str, int]) -> Iterator[Figures]:
    """The plan's own techniques at 2,048 tokens on cards of six sizes, within the memory of each.

    A card whose plan is that of the next larger one has no row of its own.
    """
    for shape, layers in lab.some(tuple(shapes.items()), 4):
        forecaster = lab.forecaster(shape, layers=layers)
        tokens, stage, before = lab.tokens(TOKENS), None, None
        batch = lab.batch(forecaster, tokens)
        for card in lab.some(CARDS_GIB):
            plan = lab.planned(forecaster, one_document(tokens), card * GIB)
            if plan.techniques == before:
                continue
            before = plan.techniques
            row = {"shape": shape, "layers": forecaster.layers, "card_bytes": card * GIB, "techniques": on(before)}
            if not plan.fits:
                yield {**row, "ran": False, "why": "forecast not to fit"}
                continue
            stage = brought_to(lab, forecaster, stage, before)
            with limited_to(lab, card * GIB):
                measured = lab.try_to_measure(stage, batch)
                yield {**row, **beside(plan.forecast, measured), "process_bytes": lab.process_bytes()}
        stage = None
        let_memory_go()


def brought_to(lab: Lab, forecaster: Forecaster, stage: Stage | None, techniques: Techniques) -> Stage:
    """`stage` with these techniques, or where something would have to be switched off a new one."""
    if stage is not None and techniques.on_top_of(stage.engine.techniques) == techniques:
        stage.engine.switch_to(techniques)
        return stage
    del stage
    let_memory_go()
    return lab.build(forecaster, techniques)


def length_rows(lab: Lab, shape: str) -> Iterator[Figures]:
    """No technique, recomputation and the plan of a small card; lengths forecast not to fit are not tried."""
    forecaster = lab.forecaster(shape)
    stage = None
    for techniques in (PLAIN, recomputed(forecaster)):
        stage = brought_to(lab, forecaster, stage, techniques)
        for length in lab.some(LENGTHS):
            tokens = lab.tokens(length)
            forecast = forecaster.forecast(techniques, BatchShape.of_one_document(tokens))
            row = {"tokens": tokens, "techniques": on(techniques)}
            if forecast.device_bytes > lab.device.free_bytes:
                yield {**row, "ran": False, "forecast_bytes": forecast.allocated_bytes, "why": "forecast not to fit"}
                continue
            yield {**row, **beside(forecast, lab.try_to_measure(stage, lab.batch(forecaster, tokens)))}
    for length in lab.some(LENGTHS):
        tokens = lab.tokens(length)
        plan = lab.planned(forecaster, one_document(tokens), PLANNED_CARD_GIB * GIB)
        stage = brought_to(lab, forecaster, stage, plan.techniques)
        measured = lab.try_to_measure(stage, lab.batch(forecaster, tokens))
        row = {"tokens": tokens, "techniques": f"plan for {PLANNED_CARD_GIB} GiB: {on(plan.techniques)}"}
        yield {**row, **beside(plan.forecast, measured)}


def floor_rows(lab: Lab, shape: str, ways: Sequence[bool]) -> Iterator[Figures]:
    """2,048 tokens with every technique; `ways` says whether layers are streamed."""
    forecaster, tokens = lab.forecaster(shape), lab.tokens(TOKENS)
    for is_streamed in ways:
        techniques = everything(forecaster, is_streamed)
        start = time.perf_counter()
        stage = lab.build(forecaster, techniques)
        built = time.perf_counter() - start
        forecast = forecaster.forecast(techniques, BatchShape.of_one_document(tokens))
        measured = lab.try_to_measure(stage, lab.batch(forecaster, tokens))
        row = {"shape": shape, "tokens": tokens, "weights": "streamed" if is_streamed else "resident"}
        yield {**row, **beside(forecast, measured), "build_seconds": built}
        del stage
        let_memory_go()


def per_token_rows(lab: Lab) -> Iterator[Figures]:
    """The slope between two lengths: what a further token of context takes."""
    forecaster = lab.forecaster("llama_8b")
    whole = replace(recomputed(forecaster), host_checkpoints=True)
    ways = {
        "recomputed, checkpoints in host memory": whole,
        "the same in tiles": replace(whole, tile_tokens=1024),
        "every technique": everything(forecaster, is_streamed=False),
    }
    short, long = lab.tokens(8192), lab.tokens(32768)
    for name, techniques in lab.some(tuple(ways.items())):
        stage = lab.build(forecaster, techniques)
        forecasts = [forecaster.forecast(techniques, BatchShape.of_one_document(n)) for n in (short, long)]
        measured = [lab.try_to_measure(stage, lab.batch(forecaster, n)) for n in (short, long)]
        row: Figures = {"techniques": name, "from_tokens": short, "to_tokens": long}
        row["forecast_per_token"] = _slope(forecasts[0].allocated_bytes, forecasts[1].allocated_bytes, short, long)
        if all(each["ran"] for each in measured):
            ends = [each["allocated_bytes"] for each in measured]
            row["measured_per_token"] = _slope(ends[0], ends[1], short, long)
            row["step_seconds"] = measured[1]["step_seconds"]
        row["host_per_token"] = _slope(forecasts[0].host_bytes, forecasts[1].host_bytes, short, long)
        yield row
        del stage
        let_memory_go()


def _slope(first: int, second: int, short: int, long: int) -> float:
    return (second - first) / (long - short)


def context_rows(lab: Lab, card_bytes: int) -> Iterator[Figures]:
    """Llama 8B on a card of that size: the forecast longest context, and the longest of a few tries that runs.

    With every technique a step at the longest context takes minutes; that is tried at the longest length for which
    one does not.
    """
    ways = {
        "recomputed, checkpoints in host memory": Memory(
            keep_layers=0,
            keep_attention=0,
            checkpoints="host",
            tile_tokens=0,
            embedding="device",
            head="16bit",
            stream_layers=0,
            head_groups=1,
        ),
        "what the plan takes": Memory(),
    }
    for name, memory in lab.some(tuple(ways.items())):
        forecaster = lab.forecaster("llama_8b", recipe_of(memory))
        if lab.is_rehearsed:
            small = forecaster.forecast(everything(forecaster, True), BatchShape.of_one_document(96))
            card_bytes = 2 * small.device_bytes
        budget = Budget(card_bytes, round(HOST_FRACTION * lab.device.host_free_bytes))
        furthest = longest(forecaster, budget).tokens
        row: Figures = {"card_bytes": card_bytes, "techniques": name, "forecast_longest": furthest}
        start = min(furthest, affordable_tokens(forecaster))
        if start < 64:
            yield {**row, "why": "forecast not to fit"}
            continue
        plan = lab.planned(forecaster, one_document(start), card_bytes)
        with limited_to(lab, card_bytes):
            yield {**row, **climb_from(lab, forecaster, plan.techniques, (start, furthest), card_bytes)}


def affordable_tokens(forecaster: Forecaster) -> int:
    """The longest context whose step takes `SLOWEST_PROBE_SECONDS` at most, roughly."""
    text = forecaster.passes.config.get_text_config()
    linear = 8 * forecaster.standing.active_parameters
    square = 4.5 * 2 * text.hidden_size * max(1, forecaster.layers)
    tokens = 1024
    while linear * 2 * tokens + square * (2 * tokens) ** 2 < SLOWEST_PROBE_SECONDS * OPERATIONS_ASSUMED:
        tokens *= 2
    return tokens


def climb_from(
    lab: Lab, forecaster: Forecaster, techniques: Techniques, lengths: tuple[int, int], card_bytes: int
) -> Figures:
    """Tries lengths around the first of `lengths`, upwards while they run, else downwards; the second is the forecast
    longest, which is another where that would take too long."""
    stage = lab.build(forecaster, techniques)
    start, furthest = lengths
    tries: list[tuple[int, bool]] = []
    factors = {True: (1.02, 1.05, 1.10), False: (0.97, 0.93, 0.88)}

    def runs(tokens: int) -> bool:
        most = card_bytes - lab.device.outside_bytes
        has_run = bool(lab.try_to_measure(stage, lab.batch(forecaster, tokens), most)["ran"])
        tries.append((tokens, has_run))
        return has_run

    is_up, is_cut = runs(start), start < furthest
    for factor in () if is_cut and is_up else lab.some(factors[is_up]):
        if runs(int(start * factor)) != is_up:
            break
    ran = [tokens for tokens, has_run in tries if has_run]
    return {
        "ran_longest": max(ran, default=0),
        "is_cut_for_time": is_cut,
        "tried": ", ".join(f"{tokens:,} {'ran' if has_run else 'ran out'}" for tokens, has_run in tries),
        "in_tries": on(techniques),
    }
