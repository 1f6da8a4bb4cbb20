#!/usr/bin/env python3
"""Everything that only a CUDA card can tell, in one call of at most ten minutes.

    scripts/bench_gpu.py                        every item; figures go to benchmarks/gpu.json and gpu.md
    scripts/bench_gpu.py --items floor_8b,cost  some of them
    scripts/bench_gpu.py --dry-run              the same code on the processor, tiny shapes: figures mean nothing

    machine       the card, its arithmetic and its link to the host
    forecast_*    forecast beside torch's allocator, 512 to 32,768 tokens: no technique, recomputation, the plan's own
    floor_*       the least memory at 2,048 tokens: all weights resident, all layers streamed
    cost          what each technique adds to a step, at 2,048 and 8,192 tokens, off and on taking turns
    per_token     bytes for each further token of context, from two lengths
    card_*        a smaller card, by torch's memory fraction: the longest context that really runs beside the forecast
    beside_trl    tokens a second beside a plain trl script, within the same memory

Models are of the published shapes with random weights, which are made and quantised on the card one by one: no file is
read, and the 16-bit model never exists. Every item is a process of its own with a time limit, so that one that crashes
or runs out of memory costs the others nothing; figures are on disk as soon as a row is measured, and items for which no
time is left are named. Memory is torch's, without the CUDA context. Refuses to start without a card.
"""

import argparse
import dataclasses
import gc
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from profile_memory import (
    Stage,
    any_tokenizer,
    batch_of,
    count_step,
    random_rows,
    random_weights,
    set_up,
    step,
)
from transformers import AutoConfig, PreTrainedConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer

from qtune.data.packing import PackedRow, pack
from qtune.events import Event, StepDone
from qtune.hardware import Device, find_device
from qtune.memory.memory_report import Ledger
from qtune.memory.memory_tracker import LiveBytes
from qtune.memory.oom_recovery import free_memory, is_out_of_memory, let_go
from qtune.memory.techniques import STEPS, Techniques
from qtune.model import adapter, base
from qtune.model.loaded import Loaded
from qtune.plan import activation_memory
from qtune.plan.forecast import Forecast, Forecaster
from qtune.plan.ladder import Budget
from qtune.plan.max_context import longest
from qtune.plan.plan import Plan
from qtune.plan.planner import decide
from qtune.plan.workload import BatchShape, Work
from qtune.recipe.schema import Data, Lora, Memory, Model, Recipe, Train
from qtune.train.dry_run import finish_step
from qtune.train.learner import Learner
from qtune.train.loop import TrainingSession
from qtune.train.rows import TrainingRows
from qtune.units import GIB

Figures = dict[str, Any]

ROPE = {"rope_type": "default", "rope_theta": 500_000.0}
SHAPES: dict[str, dict[str, Any]] = {
    "llama_8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "llama_70b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "qwen3_4b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "qwen3_30b_a3b": {
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    },
}
TINY = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
TINY_TOKENS_DIVISOR = 128
LENGTHS = (512, 2048, 8192, 32768)
RANK = 16
PLANNED_CARD_GIB = 12
TRL_CARD_GIB, TRL_ROWS, TRL_STEPS, TRL_FIRST, TRL_BATCH = 16, 160, 12, 3, 8
TOTAL_SECONDS, LEAST_SECONDS = 550, 20
SLOWEST_PROBE_SECONDS = 30
OPERATIONS_ASSUMED = 300e12  # to leave out a probe that would take minutes


@dataclass(frozen=True)
class Lab:
    """Where the items run: the card and the real shapes, or the processor and tiny ones."""

    device: Device
    is_dry: bool

    def config(self, shape: str) -> PreTrainedConfig:
        described = {"max_position_embeddings": 4_194_304, "rope_parameters": ROPE, **SHAPES[shape]}
        if self.is_dry:
            described |= {name: value for name, value in TINY.items() if name in described}
        return AutoConfig.for_model(**described)

    def some(self, choices: Sequence[Any], few: int = 1) -> Sequence[Any]:
        """All of `choices`; in a dry run the first `few`."""
        return choices[:few] if self.is_dry else choices

    def tokens(self, count: int) -> int:
        return max(8, count // TINY_TOKENS_DIVISOR) if self.is_dry else count

    def forecaster(self, shape: str, memory: Memory | None = None) -> Forecaster:
        device = self.device
        recipe = recipe_of(memory or Memory())
        return activation_memory.forecaster(
            self.config(shape), recipe, device.compute_dtype, device.capability, device.outside_bytes
        )

    def build(self, forecaster: Forecaster, techniques: Techniques) -> Stage:
        """A fresh model of the forecaster's shape with random weights."""
        name, dtype, recipe = self.device.name, self.device.compute_dtype, forecaster.recipe
        loaded = random_weights(forecaster.passes.config, recipe.model, name, dtype, techniques)
        return set_up(loaded, recipe, techniques, dtype, name)

    def batch(self, forecaster: Forecaster, tokens: int) -> dict[str, Any]:
        vocabulary = forecaster.passes.config.get_text_config().vocab_size
        return batch_of(random_rows(1, tokens, vocabulary), self.device.name)

    def measure(self, stage: Stage, batch: dict[str, Any]) -> Figures:
        """Peak bytes and seconds of one step, gradients and optimizer state there before it."""
        if not self.device.is_card:
            counter, start = LiveBytes(), time.perf_counter()
            count_step(stage, batch, accumulates=True, counter=counter)
            counted = max(peak.device_bytes for peak in counter.peaks.values())
            return {"allocated_bytes": counted, "reserved_bytes": None, "step_seconds": time.perf_counter() - start}
        for parameter in adapter.trained_parameters(stage.model):
            parameter.grad = torch.zeros_like(parameter)
        stage.optimizer.step()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        stage.loss_of(batch).backward()
        finish_step(stage.model, stage.optimizer)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        stage.model.zero_grad()
        return {
            "allocated_bytes": torch.cuda.max_memory_allocated(),
            "reserved_bytes": torch.cuda.max_memory_reserved(),
            "step_seconds": seconds,
        }

    def try_to_measure(self, stage: Stage, batch: dict[str, Any], most_bytes: int | None = None) -> Figures:
        """The same; `ran` is False where memory ran out, or on the processor where `most_bytes` would not have done."""
        try:
            found = self.measure(stage, batch)
        except Exception as fault:
            if not is_out_of_memory(fault):
                raise
            let_go(fault)
            stage.engine.forget_pass()
            stage.model.zero_grad()
            free_memory()
            return {"ran": False}
        if most_bytes is not None and not self.device.is_card and found["allocated_bytes"] > most_bytes:
            return {"ran": False}
        return {"ran": True, **found}


def recipe_of(memory: Memory) -> Recipe:
    return Recipe(
        name="bench",
        model=Model(base="demo"),
        lora=Lora(rank=RANK, alpha=2 * RANK),
        data=Data(train="none"),
        train=Train(optimizer="adamw_8bit"),
        memory=memory,
    )


def let_memory_go() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def everything(forecaster: Forecaster, is_streamed: bool) -> Techniques:
    """Every technique that the model allows, streaming or not."""
    techniques = Techniques()
    for rung in STEPS:
        if rung.technique not in forecaster.standing.refusals and (is_streamed or rung.technique != "streamed_layers"):
            techniques = rung.up(techniques, forecaster.standing)
    return techniques


def recomputed(forecaster: Forecaster) -> Techniques:
    return Techniques(recomputed_layers=forecaster.layers)


def on(techniques: Techniques) -> str:
    """`recomputed_layers 32, tile_tokens 1024`: what differs from nothing."""
    off = dataclasses.asdict(Techniques())
    changed = {name: value for name, value in dataclasses.asdict(techniques).items() if value != off[name]}
    return ", ".join(name if value is True else f"{name} {value}" for name, value in changed.items()) or "none"


def beside(forecast: Forecast, found: Figures) -> Figures:
    """Forecast and measured bytes, and by what fraction of what was measured the forecast is off."""
    reserved = forecast.allocated_bytes + forecast.device.get("slack", 0)
    result: Figures = {"forecast_bytes": forecast.allocated_bytes, **found}
    if found.get("ran", True):
        result["off_fraction"] = forecast.allocated_bytes / found["allocated_bytes"] - 1
        if found["reserved_bytes"]:
            result["reserved_off_fraction"] = reserved / found["reserved_bytes"] - 1
    result["host_forecast_bytes"] = forecast.host_bytes
    return result


# ---- the items: each yields rows


def machine(lab: Lab) -> Iterator[Figures]:
    """What the card does at best: 16-bit products of matrices, and copies from page-locked memory."""
    size, count = (8192, 20) if lab.device.is_card else (128, 2)
    square = torch.randn(size, size, device=lab.device.name, dtype=torch.bfloat16)
    home = torch.empty(size * size * 4, dtype=torch.uint8, pin_memory=lab.device.is_card)
    there = torch.empty_like(home, device=lab.device.name)

    def seconds(act: Callable[[], object]) -> float:
        act()
        synchronize(lab)
        start = time.perf_counter()
        for _ in range(count):
            act()
        synchronize(lab)
        return (time.perf_counter() - start) / count

    yield {
        "card": lab.device.label,
        "total_bytes": lab.device.total_bytes,
        "outside_bytes": lab.device.outside_bytes,
        "tflops": 2 * size**3 / seconds(lambda: square @ square) / 1e12,
        "copy_gb_per_second": home.nbytes / seconds(lambda: there.copy_(home, non_blocking=True)) / 1e9,
    }


def synchronize(lab: Lab) -> None:
    if lab.device.is_card:
        torch.cuda.synchronize()


def forecast_rows(lab: Lab, shape: str) -> Iterator[Figures]:
    """The card has to hold what the forecast says; lengths that it could not hold are not tried."""
    forecaster = lab.forecaster(shape)
    plain = [Techniques(), recomputed(forecaster)]
    stage = lab.build(forecaster, plain[0])
    for techniques in plain:  # one model serves both, as recomputation can be switched on later
        stage.engine.switch_to(techniques)
        for length in lab.some(LENGTHS):
            tokens = lab.tokens(length)
            forecast = forecaster.forecast(techniques, BatchShape.of_one_document(tokens))
            row = {"tokens": tokens, "techniques": on(techniques)}
            if forecast.device_bytes > lab.device.free_bytes:
                yield {**row, "ran": False, "forecast_bytes": forecast.allocated_bytes, "why": "forecast not to fit"}
                continue
            yield {**row, **beside(forecast, lab.try_to_measure(stage, lab.batch(forecaster, tokens)))}
    del stage
    let_memory_go()
    for length in lab.some(LENGTHS):
        tokens = lab.tokens(length)
        plan = planned(lab, forecaster, tokens, PLANNED_CARD_GIB * GIB)
        stage = lab.build(forecaster, plan.techniques)
        found = lab.try_to_measure(stage, lab.batch(forecaster, tokens))
        row = {"tokens": tokens, "techniques": f"plan for {PLANNED_CARD_GIB} GiB: {on(plan.techniques)}"}
        yield {**row, **beside(plan.forecast, found)}
        del stage
        let_memory_go()


def planned(lab: Lab, forecaster: Forecaster, tokens: int, card_bytes: int) -> Plan:
    """What qtune would do for one document of so many tokens on a card of that size."""
    work = Work((BatchShape.of_one_document(tokens),))
    smaller = replace(lab.device, total_bytes=card_bytes, free_bytes=card_bytes)
    return decide(forecaster.recipe, smaller, forecaster.passes.config, work)


def floor_rows(lab: Lab, shape: str, ways: Sequence[bool]) -> Iterator[Figures]:
    """2,048 tokens with every technique; `ways` says whether layers are streamed."""
    forecaster, tokens = lab.forecaster(shape), lab.tokens(2048)
    for is_streamed in ways:
        techniques = everything(forecaster, is_streamed)
        start = time.perf_counter()
        stage = lab.build(forecaster, techniques)
        built = time.perf_counter() - start
        forecast = forecaster.forecast(techniques, BatchShape.of_one_document(tokens))
        batch = lab.batch(forecaster, tokens)
        lab.try_to_measure(stage, batch)  # the first step also sets up the copies
        found = lab.try_to_measure(stage, batch)
        row = {"shape": shape, "tokens": tokens, "weights": "streamed" if is_streamed else "resident"}
        yield {**row, **beside(forecast, found), "build_seconds": built}
        del stage
        let_memory_go()


def cost_rows(lab: Lab) -> Iterator[Figures]:
    """Step times with a technique and without, by turns, on two models of the same weights; recomputation is on in
    both."""
    forecaster = lab.forecaster("llama_8b")
    under = recomputed(forecaster)
    without = lab.build(forecaster, under)
    groups = everything(forecaster, is_streamed=False).head_groups
    tried = {
        "checkpoints in host memory": replace(under, host_checkpoints=True),
        "MLP and norms in tiles": replace(under, tile_tokens=lab.tokens(1024)),
        "streamed layers": replace(under, streamed_layers=forecaster.layers),
        "heads in groups": replace(under, head_groups=groups),
    }
    for name, techniques in tried.items():
        stage = lab.build(forecaster, techniques)
        for tokens, rounds in lab.some(((lab.tokens(2048), 7), (lab.tokens(8192), 3))):
            batch = lab.batch(forecaster, tokens)
            pairs = [(timed(lab, stage, batch), timed(lab, without, batch)) for _ in lab.some(range(rounds + 1), 2)][1:]
            yield {
                "technique": name,
                "tokens": tokens,
                "step_seconds": statistics.median(one for one, _ in pairs),
                "without_seconds": statistics.median(other for _, other in pairs),
                "cost_fraction": statistics.median(one / other for one, other in pairs) - 1,
                "rounds": rounds,
            }
        del stage
        let_memory_go()


def timed(lab: Lab, stage: Stage, batch: dict[str, Any]) -> float:
    synchronize(lab)
    start = time.perf_counter()
    step(stage, batch)
    synchronize(lab)
    return time.perf_counter() - start


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
        found = [lab.try_to_measure(stage, lab.batch(forecaster, n)) for n in (short, long)]
        row: Figures = {"techniques": name, "from_tokens": short, "to_tokens": long}
        row["forecast_per_token"] = _slope(forecasts[0].allocated_bytes, forecasts[1].allocated_bytes, short, long)
        if all(each["ran"] for each in found):
            row["measured_per_token"] = _slope(found[0]["allocated_bytes"], found[1]["allocated_bytes"], short, long)
            row["step_seconds"] = found[1]["step_seconds"]
        row["host_per_token"] = _slope(forecasts[0].host_bytes, forecasts[1].host_bytes, short, long)
        yield row
        del stage
        let_memory_go()


def _slope(first: int, second: int, short: int, long: int) -> float:
    return (second - first) / (long - short)


def card_rows(lab: Lab, card_bytes: int) -> Iterator[Figures]:
    """Llama 8B on a card of that size: the forecast longest context, and the longest of a few tries that runs.

    With every technique a step at the longest context takes minutes; that is tried at the longest length for which
    one does not.
    """
    ways = {
        "recomputed, checkpoints in host memory": Memory(
            keep_layers=0,
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
        forecaster = lab.forecaster("llama_8b", memory)
        if lab.is_dry:
            small = forecaster.forecast(everything(forecaster, True), BatchShape.of_one_document(96))
            card_bytes = 2 * small.device_bytes
        budget = Budget(card_bytes, round(0.8 * lab.device.host_free_bytes))
        furthest = longest(forecaster, budget).tokens
        row: Figures = {"card_bytes": card_bytes, "techniques": name, "forecast_longest": furthest}
        start = min(furthest, affordable_tokens(forecaster))
        if start < 64:
            yield {**row, "why": "forecast not to fit"}
            continue
        plan = planned(lab, forecaster, start, card_bytes)
        with limited_to(lab, card_bytes):
            yield {**row, **climb_from(lab, forecaster, plan.techniques, start, start < furthest, card_bytes)}


class limited_to:
    """Inside, torch may take no more than a card of `card_bytes` would leave it."""

    def __init__(self, lab: Lab, card_bytes: int):
        self.lab, self.card_bytes = lab, card_bytes

    def __enter__(self) -> None:
        if self.lab.device.is_card:
            share = (self.card_bytes - self.lab.device.outside_bytes) / self.lab.device.total_bytes
            torch.cuda.set_per_process_memory_fraction(min(1.0, share))

    def __exit__(self, *fault: object) -> None:
        let_memory_go()
        if self.lab.device.is_card:
            torch.cuda.set_per_process_memory_fraction(1.0)


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
    lab: Lab, forecaster: Forecaster, techniques: Techniques, start: int, is_cut: bool, card_bytes: int
) -> Figures:
    """Tries lengths around `start`, upwards while they run, else downwards."""
    stage = lab.build(forecaster, techniques)
    tries: list[tuple[int, bool]] = []
    factors = {True: (1.02, 1.05, 1.10), False: (0.97, 0.93, 0.88)}

    def runs(tokens: int) -> bool:
        most = card_bytes - lab.device.outside_bytes
        has_run = bool(lab.try_to_measure(stage, lab.batch(forecaster, tokens), most)["ran"])
        tries.append((tokens, has_run))
        return has_run

    is_up = runs(start)
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


def trl_rows(lab: Lab) -> Iterator[Figures]:
    """Rows of many lengths: trl at its defaults pads a batch of them, qtune packs them; both within one memory limit.

    Useful tokens a second from the fourth step on. trl's batch is halved until it fits, as a person would.
    """
    card_bytes = TRL_CARD_GIB * GIB
    forecaster = lab.forecaster("llama_8b")
    draw = torch.Generator().manual_seed(0)
    drawn = torch.empty(TRL_ROWS).log_normal_(mean=5.8, std=0.7, generator=draw)
    lengths = [lab.tokens(int(length)) for length in drawn.clamp(48, 2048)]
    rows = [random_rows(1, length, forecaster.passes.config.get_text_config().vocab_size)[0] for length in lengths]
    results = {}
    with limited_to(lab, card_bytes):
        for who, run in (("plain trl", trl_run), ("qtune", qtune_run)):
            results[who] = run(lab, forecaster, rows, card_bytes)
            let_memory_go()
            yield {"who": who, "card_bytes": card_bytes, **results[who]}
    speeds = [results[who]["tokens_per_second"] for who in ("qtune", "plain trl")]
    if all(speeds):
        yield {"who": "qtune beside plain trl", "ratio": speeds[0] / speeds[1]}


@dataclass
class Clock(TrainerCallback):
    """When each step ended."""

    ends: list[float] = field(default_factory=list)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def trl_run(lab: Lab, forecaster: Forecaster, rows: Sequence[PackedRow], card_bytes: int) -> Figures:
    """What a person writes after reading trl's documentation."""
    batch = TRL_BATCH
    while batch:
        try:
            return _trl_run(lab, forecaster, rows, batch)
        except Exception as fault:
            if not is_out_of_memory(fault):
                raise
            let_go(fault)
        free_memory()
        batch //= 2
    return {"ran": False, "tokens_per_second": None}


def _trl_run(lab: Lab, forecaster: Forecaster, rows: Sequence[PackedRow], batch: int) -> Figures:
    device, clock = lab.device, Clock()
    reset_peak(lab)
    loaded = random_weights(
        forecaster.passes.config, forecaster.recipe.model, device.name, device.compute_dtype, attention="sdpa"
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=loaded,
            args=SFTConfig(
                output_dir=folder,
                max_steps=steps_of(lab),
                per_device_train_batch_size=batch,
                max_length=2048,
                report_to=[],
                save_strategy="no",
                logging_steps=1,
                disable_tqdm=True,
                use_cpu=not device.is_card,
                bf16=device.compute_dtype == "bfloat16",
            ),
            train_dataset=Dataset.from_list([{"input_ids": row["input_ids"]} for row in rows]),
            processing_class=any_tokenizer(),
            peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[clock],
        )
        trainer.train()
    seen = [log["num_tokens"] for log in trainer.state.log_history if "num_tokens" in log]
    first = min(TRL_FIRST, steps_of(lab)) - 1
    speed = (seen[steps_of(lab) - 1] - seen[first]) / (clock.ends[-1] - clock.ends[first])
    return {"ran": True, "batch": batch, "tokens_per_second": speed, "allocated_bytes": peak_of(lab)}


def qtune_run(lab: Lab, forecaster: Forecaster, rows: Sequence[PackedRow], card_bytes: int) -> Figures:
    """`qtune run` without files: the plan for a card of that size, then its own training loop."""
    tokens, count = lab.tokens(2048), steps_of(lab)
    packs = pack([len(row["input_ids"]) for row in rows], tokens)
    packed = [joined([rows[i] for i in members]) for members in packs]
    recipe = replace_train(forecaster.recipe, max_steps=count, epochs=1000.0, micro_batch=TRL_BATCH)
    device = replace(lab.device, total_bytes=card_bytes, free_bytes=card_bytes)
    plan = decide(recipe, device, forecaster.passes.config, Work.of_rows(packed))
    events: list[Event] = []
    reset_peak(lab)
    frozen = random_weights(forecaster.passes.config, recipe.model, device.name, plan.compute_dtype, plan.techniques)
    stage = set_up(frozen, recipe, plan.techniques, plan.compute_dtype, device.name)
    loaded = Loaded(stage.model, any_tokenizer(), device.name, plan.compute_dtype)
    learner = Learner.of(loaded, stage.engine, Ledger.begin(device), plan, events.append)
    TrainingSession(recipe, plan, learner, TrainingRows(packed), events.append).run()
    steps = [event for event in events if isinstance(event, StepDone)][min(TRL_FIRST, count) :]
    speed = sum(event.tokens for event in steps) / sum(event.step_seconds for event in steps)
    return {
        "ran": True,
        "batch": plan.micro_batch,
        "techniques": on(plan.techniques),
        "tokens_per_second": speed,
        "allocated_bytes": peak_of(lab),
    }


def steps_of(lab: Lab) -> int:
    return 5 if lab.is_dry else TRL_STEPS


def replace_train(recipe: Recipe, **changes: Any) -> Recipe:
    train = recipe.train.model_copy(update={"gradient_accumulation": 1, **changes})
    memory = recipe.memory.model_copy(update={"rehearse": False})
    return recipe.model_copy(update={"train": train, "memory": memory})


def joined(rows: Sequence[PackedRow]) -> PackedRow:
    return {
        "input_ids": [token for row in rows for token in row["input_ids"]],
        "labels": [label for row in rows for label in row["labels"]],
        "seq_lengths": [length for row in rows for length in row["seq_lengths"]],
    }


def reset_peak(lab: Lab) -> None:
    let_memory_go()
    if lab.device.is_card:
        torch.cuda.reset_peak_memory_stats()


def peak_of(lab: Lab) -> int | None:
    return torch.cuda.max_memory_allocated() if lab.device.is_card else None


@dataclass(frozen=True)
class Item:
    """A group of rows, and the most seconds it may take."""

    rows: Callable[[Lab], Iterator[Figures]]
    seconds: int


ITEMS = {
    "machine": Item(machine, 60),
    "floor_8b": Item(lambda lab: floor_rows(lab, "llama_8b", (False, True)), 90),
    "forecast_8b": Item(lambda lab: forecast_rows(lab, "llama_8b"), 150),
    "cost": Item(cost_rows, 120),
    "beside_trl": Item(trl_rows, 120),
    "floor_70b": Item(lambda lab: floor_rows(lab, "llama_70b", (True,)), 120),
    "floor_30b": Item(lambda lab: floor_rows(lab, "qwen3_30b_a3b", (False,)), 90),
    "per_token": Item(per_token_rows, 100),
    "card_8gib": Item(lambda lab: card_rows(lab, 8 * GIB), 120),
    "forecast_4b": Item(lambda lab: forecast_rows(lab, "qwen3_4b"), 120),
    "card_24gib": Item(lambda lab: card_rows(lab, 24 * GIB), 120),
}


# ---- running them


def run_item(name: str, is_dry: bool, target: Path) -> None:
    """Inside an item's own process: waits for its turn; every row is on disk as soon as it is there."""
    if not sys.stdin.readline():
        return
    base.quiet_libraries()
    lab = Lab(find_device(), is_dry)
    rows: list[Figures] = []
    for row in ITEMS[name].rows(lab):
        rows.append(row)
        write(target, rows)


class Apart:
    """One item in a process of its own, which has its imports behind it when its turn comes."""

    def __init__(self, name: str, is_dry: bool):
        self._folder = tempfile.TemporaryDirectory()
        self._target, self._said = (Path(self._folder.name) / file for file in ("rows.json", "said.txt"))
        command = [sys.executable, __file__, "--item", name, str(self._target), *(["--dry-run"] if is_dry else [])]
        with self._said.open("w", encoding="utf-8") as stream:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=stream,
                text=True,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )

    def run(self, seconds: float) -> Figures:
        """What it measured, and what ended it early."""
        start, why = time.perf_counter(), None
        try:
            self._process.communicate("go\n", timeout=seconds)
            if self._process.returncode:
                why = f"exit {self._process.returncode}: {last_line(self._said)}"
        except subprocess.TimeoutExpired:
            why = f"stopped after {seconds:.0f} s"
        rows = json.loads(self._target.read_text(encoding="utf-8")) if self._target.is_file() else []
        self.end()
        return {"rows": rows, "ended_early": why, "seconds": round(time.perf_counter() - start, 1)}

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()


def run_here(name: str, is_dry: bool) -> Figures:
    """The same without a process of its own, which costs no import: for dry runs."""
    start, rows, why = time.perf_counter(), list[Figures](), None
    try:
        for row in ITEMS[name].rows(Lab(find_device(), is_dry)):
            rows.append(row)
    except Exception as fault:
        traceback.print_exc()
        why = f"{type(fault).__name__}: {fault}"
    return {"rows": rows, "ended_early": why, "seconds": round(time.perf_counter() - start, 1)}


def last_line(file: Path) -> str:
    lines = [line for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][-300:] if lines else "it said nothing"


def write(target: Path, value: Any) -> None:
    """Whole, or as it was: a time limit may fall into the writing."""
    half = target.with_suffix(".half")
    half.write_text(json.dumps(value, indent=1), encoding="utf-8")
    half.replace(target)


def bench(names: Sequence[str], is_dry: bool, is_apart: bool, folder: Path) -> Figures:
    """Every item in turn, as long as there is time; figures are on disk after each."""
    target = folder / ("gpu_dry_run.json" if is_dry else "gpu.json")
    packages = ("torch", "transformers", "trl", "peft", "bitsandbytes")
    report: Figures = {
        "date": date.today().isoformat(),
        "is_dry_run": is_dry,
        "card": "",
        "python": sys.version.split()[0],
        "versions": {package: importlib.metadata.version(package) for package in packages},
        "settings": {"rank": RANK, "targets": "all-linear", "optimizer": "adamw_8bit", "documents": 1},
        "items": {},
    }
    ends, waiting = time.monotonic() + TOTAL_SECONDS, dict[str, Apart]()
    for index, name in enumerate(names):
        if is_apart:
            waiting |= {each: Apart(each, is_dry) for each in names[index : index + 2] if each not in waiting}
        left = ends - time.monotonic()
        if left < LEAST_SECONDS:
            found: Figures = {"rows": [], "ended_early": "not begun: no time was left", "seconds": 0}
        elif is_apart:
            found = waiting[name].run(min(ITEMS[name].seconds, left))
        else:
            found = run_here(name, is_dry)
        report["items"][name] = found
        if name == "machine" and found["rows"]:  # asked there: a context of this process would take from the card
            report["card"] = found["rows"][0]["card"]
        write(target, report)
        print(f"{name}: {len(found['rows'])} rows in {found['seconds']:.0f} s; {found['ended_early'] or 'whole'}")
    for apart in waiting.values():
        apart.end()
    write(target, report)
    target.with_suffix(".md").write_text(markdown(report), encoding="utf-8")
    return report


def markdown(report: Figures) -> str:
    """A table an item."""
    head = "A dry run on the processor: these figures mean nothing." if report["is_dry_run"] else report["card"]
    lines = [f"# {report['date']}, {head}", "", f"Python {report['python']}, "]
    lines[-1] += ", ".join(f"{name} {version}" for name, version in report["versions"].items()) + "."
    lines += ["", ", ".join(f"{name} {value}" for name, value in report["settings"].items()) + "; random weights."]
    for name, item in report["items"].items():
        lines += ["", f"## {name}", ""]
        if item["ended_early"]:
            lines += [f"Ended early: {item['ended_early']}", ""]
        columns = list(dict.fromkeys(key for row in item["rows"] for key in row))
        if columns:
            lines.append("| " + " | ".join(titled(column) for column in columns) + " |")
            lines.append("|" + "---|" * len(columns))
        for row in item["rows"]:
            lines.append("| " + " | ".join(told(column, row.get(column)) for column in columns) + " |")
    return "\n".join(lines) + "\n"


UNITS = {"_bytes": ", GiB", "_seconds": ", s", "_fraction": ", %", "_per_token": ", KiB a token"}


def titled(column: str) -> str:
    for ending, unit in UNITS.items():
        if column.endswith(ending):
            return column.removesuffix(ending).replace("_", " ") + unit
    return column.replace("_", " ")


def told(column: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if column.endswith("_bytes"):
        return f"{value / GIB:.3f}"
    if column.endswith("_fraction"):
        return f"{100 * value:+.1f}"
    if column.endswith("_per_token"):
        return f"{value / 1024:.1f}"
    if isinstance(value, float):
        return f"{value:.3f}" if value < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks"), metavar="FOLDER", help="where figures go")
    parser.add_argument("--items", default=",".join(ITEMS), metavar="NAMES", help="which, with commas between them")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the processor, in this process")
    parser.add_argument("--apart", action="store_true", help="give the items of a dry run their processes, too")
    parser.add_argument("--item", nargs=2, metavar=("NAME", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    names = [name for name in options.items.split(",") if name]
    unknown = [name for name in names if name not in ITEMS]
    if unknown:
        print(f"--items: there is no {unknown[0]!r}. There are {', '.join(ITEMS)}.", file=sys.stderr)
        return 2
    if not torch.cuda.is_available() and not options.dry_run:
        print(
            "torch finds no CUDA card here, and this measures one. --dry-run goes through the same code on the"
            " processor, with tiny shapes.",
            file=sys.stderr,
        )
        return 2
    if options.item:
        run_item(options.item[0], options.dry_run, Path(options.item[1]))
        return 0
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        report = bench(names, options.dry_run, options.apart or not options.dry_run, options.output)
    except OSError as fault:
        print(f"--output {options.output}: cannot be written ({fault.strerror}).", file=sys.stderr)
        return 2
    print(markdown(report))
    return 0 if all(item["ended_early"] is None for item in report["items"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
