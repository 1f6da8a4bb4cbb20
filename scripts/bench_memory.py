#!/usr/bin/env python3
"""Each memory technique off and on: peak bytes on the device and in host memory, tokens a second, and the loss.

    scripts/bench_memory.py --shape 100m
    scripts/bench_memory.py --base qtune/demo_base --tokens 512 --rounds 5 --json demo.json

Three groups of rows: nothing at all; recomputation with one other technique; the ladder, each rung on top of those
before it. Every row is a model of its own with the same weights and adapter. They take turns, one optimizer step each
a round, so that a machine whose speed drifts slows all of them; speeds are medians, ratios are taken within a round.
Time is the clock's on a card; on the CPU it is the processor time of this process, which other work does not lengthen
and several threads add up to: set OMP_NUM_THREADS=1.

Peaks are of a step apart from the timed ones, which it also warms up: on the CPU every tensor is counted, by what it
would be on a card; on a card the allocator is asked for the device, and the counter for the host. The loss is that of
the last step, after as many real optimizer steps in each row; it is compared with that of the first row.

A --shape is a Llama with random weights, about as many parameters as its name says.
"""

import argparse
import copy
import dataclasses
import importlib.metadata
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from profile_memory import (
    Batch,
    Stage,
    batch_of,
    count_step,
    random_rows,
    random_weights,
    set_up,
    step,
    wide_console,
)
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel

from qtune import logs
from qtune.errors import ModelError, QtuneError
from qtune.hardware import find_device
from qtune.memory import fused_cross_entropy
from qtune.memory.memory_parts import standing_parts
from qtune.memory.memory_tracker import LiveBytes, storage_sizes
from qtune.memory.techniques import STEPS, TECHNIQUES, Techniques
from qtune.model import base
from qtune.plan import activation_memory
from qtune.plan.forecast import Forecaster
from qtune.plan.workload import BatchShape
from qtune.recipe.schema import Data, Lora, Model, Recipe, Train
from qtune.units import format_bytes

SHAPES = {
    "100m": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
    "300m": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 17, "num_attention_heads": 16},
}
SHARED_SHAPE = {"vocab_size": 16384, "num_key_value_heads": 4, "max_position_embeddings": 131072}
RANK, LEARNING_RATE = 16, 1e-3


@dataclass(frozen=True)
class Trial:
    """One row of the table: its `name`, what is on, and the name of the row it is compared with."""

    name: str
    beside: str
    techniques: Techniques


@dataclass(frozen=True)
class Row:
    """What one trial took. `device` and `host` are bytes by part at the peak, `seconds` one figure a round."""

    name: str
    beside: str
    techniques: dict[str, Any]
    forecast_bytes: int
    device_bytes: int
    host_bytes: int
    device: dict[str, int]
    host: dict[str, int]
    seconds: tuple[float, ...]
    loss: float


def trials_of(forecaster: Forecaster) -> tuple[list[Trial], list[str]]:
    """The rows for a model, and a sentence on each technique that it refuses."""
    refused = forecaster.standing.refusals
    steps = [step for step in STEPS if not (step.technique in refused or TECHNIQUES[step.technique].needs_ranks)]
    plain = Trial("no technique", "no technique", Techniques())
    ladder, techniques = [plain], plain.techniques
    for rung in steps:
        higher = rung.up(techniques, forecaster.standing)
        if higher != techniques:  # the head is on the host, or in NF4
            techniques = higher
            ladder.append(Trial(f"+ {rung.name}", plain.name, techniques))
    alone = []
    if steps and steps[0].technique == "recomputed_layers":
        under = ladder[1]
        alone = [
            Trial(f"recompute, {rung.name}", under.name, rung.up(under.techniques, forecaster.standing))
            for rung in steps[1:]
        ]
        alone = [trial for trial in alone if trial.techniques != ladder[2].techniques]  # it is the third rung
    return ladder + alone, [f"{field}: {why}" for field, why in refused.items()]


def base_maker(
    folder: Path | None, shape: str, settings: Model, device: str, compute_dtype: str
) -> tuple[PreTrainedConfig, Callable[[], PreTrainedModel]]:
    """The configuration, and what makes a fresh base that is always the same."""
    if folder is not None:
        return base.read_config(settings), lambda: base.load_base(settings, device, compute_dtype)
    config = LlamaConfig(**SHARED_SHAPE, **SHAPES[shape])
    made = random_weights(config, settings, device, compute_dtype)
    return config, lambda: copied(made)


def copied(model: PreTrainedModel) -> PreTrainedModel:
    """A model of its own with the same weights."""
    result = copy.deepcopy(model)
    for module in result.modules():
        if isinstance(module, Linear4bit):  # bitsandbytes names the state twice and copies it once for each
            module.quant_state = module.weight.quant_state
    fused_cross_entropy.install(result)
    return result


def count(stage: Stage, batch: Batch, is_cuda: bool) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes by part at the peak of a step, on the device and in host memory."""
    parts = standing_parts(stage.model, stage.engine, stage.optimizer)
    standing = sum(storage_sizes(tensors) for _, side, tensors in parts if side == "device")
    if is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    counter = LiveBytes()
    count_step(stage, batch, accumulates=True, counter=counter)
    highest = max(counter.peaks.values(), key=lambda peak: peak.device_bytes)
    host = max(counter.peaks.values(), key=lambda peak: peak.host_bytes).host
    if is_cuda:  # other models stand on the card, too
        return {"standing": standing, "in the step": torch.cuda.max_memory_allocated() - before}, host
    return highest.device, host


def timed_step(stage: Stage, batch: Batch, is_cuda: bool) -> tuple[float, float]:
    """Seconds of one optimizer step, on the CPU of processor time, and its loss."""
    clock = time.perf_counter if is_cuda else time.process_time
    start = clock()
    loss = step(stage, batch)
    if is_cuda:
        torch.cuda.synchronize()
    return clock() - start, loss


def bench(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Every row, as JSON takes it. Raises ModelError for a base whose loss is not the tiled one."""
    base.quiet_libraries()
    device = find_device()
    settings = Model(base=str(options.base.resolve()) if options.base else "demo")
    recipe = Recipe(
        name="bench",
        model=settings,
        lora=Lora(rank=RANK, alpha=2 * RANK),
        data=Data(train="none", max_tokens=options.tokens),
        train=Train(learning_rate=LEARNING_RATE, optimizer="adamw_8bit"),
    )
    config, make = base_maker(options.base, options.shape, settings, device.name, device.compute_dtype)
    forecaster = activation_memory.forecaster(config, recipe, device.compute_dtype, device.capability, 0)
    trials, refused = trials_of(forecaster)
    shape = BatchShape.of_one_document(options.tokens)
    batch = batch_of(random_rows(1, options.tokens, config.get_text_config().vocab_size), device.name)
    stages, peaks = [], []
    for trial in trials:
        stage = set_up(make(), recipe, trial.techniques, device.compute_dtype, device.name)
        if not fused_cross_entropy.suits(stage.model):
            raise ModelError("--base: its head scales, caps or biases the logits; such a loss is not benched here.")
        stages.append(stage)
        peaks.append(count(stage, batch, device.is_card))
        print(f"counted: {trial.name}", file=sys.stderr, flush=True)
    seconds: list[list[float]] = [[] for _ in trials]
    losses = [0.0] * len(trials)
    for number in range(options.rounds):
        for index, stage in enumerate(stages):
            took, losses[index] = timed_step(stage, batch, device.is_card)
            seconds[index].append(took)
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
    rows = [
        Row(
            trial.name,
            trial.beside,
            dataclasses.asdict(trial.techniques),
            forecaster.forecast(trial.techniques, shape).allocated_bytes,
            sum(on_device.values()),
            sum(on_host.values()),
            on_device,
            on_host,
            tuple(took),
            loss,
        )
        for trial, (on_device, on_host), took, loss in zip(trials, peaks, seconds, losses, strict=True)
    ]
    result = {
        "base": str(options.base or options.shape),
        "parameters": forecaster.standing.parameters,
        "tokens": options.tokens,
        "rounds": options.rounds,
        "rank": RANK,
        "device": device.label,
        "compute_dtype": device.compute_dtype,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "refused": refused,
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    console.print(table_of(rows, options.tokens))
    for sentence in refused:
        console.print(f"refused: {sentence}")
    return result


def versions() -> dict[str, str]:
    names = ("torch", "transformers", "trl", "peft", "bitsandbytes")
    return {name: importlib.metadata.version(name) for name in names}


def table_of(rows: Sequence[Row], tokens: int) -> Table:
    """One line a row; the time is against the row it is compared with, the loss against the first."""
    by_name = {row.name: row for row in rows}
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("techniques", no_wrap=True)
    for title in (
        "device peak",
        "forecast",
        "saved",
        "host",
        "tokens/s",
        "step time",
        "beside",
        "loss",
        "loss differs",
    ):
        table.add_column(title, justify="left" if title == "than" else "right", no_wrap=True)
    for row in rows:
        other = by_name[row.beside]
        ratio = statistics.median(one / two for one, two in zip(row.seconds, other.seconds, strict=True))
        off = 100 * (row.forecast_bytes - row.device_bytes) / row.device_bytes
        table.add_row(
            row.name,
            f"{row.device_bytes / 1024**2:,.1f} MiB",
            f"{off:+.2f} %",
            format_bytes(other.device_bytes - row.device_bytes) if other is not row else "",
            format_bytes(row.host_bytes) if row.host_bytes else "",
            f"{tokens / statistics.median(row.seconds):,.0f}",
            f"{ratio:.2f}x" if other is not row else "",
            row.beside.removeprefix("+ ") if other is not row else "",
            f"{row.loss:.4f}",
            f"{row.loss - rows[0].loss:+.1e}",
        )
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--base", type=Path, metavar="FOLDER", help="a model on this machine")
    which.add_argument("--shape", choices=sorted(SHAPES), default="100m", help="a random Llama of that size (100m)")
    parser.add_argument(
        "--tokens", type=whole_number, default=2048, help="tokens of the one document in a batch (2048)"
    )
    parser.add_argument("--rounds", type=whole_number, default=3, help="timed steps of each row (3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure there")
    options = parser.parse_args(arguments)
    logs.hold()
    try:
        result = bench(options, wide_console())
        if options.json:
            options.json.write_text(json.dumps(result, indent=2), encoding="utf-8")
    except OSError as fault:
        print(f"--json {options.json}: cannot be written ({fault.strerror}).", file=sys.stderr)
        return 2
    except QtuneError as fault:
        print(fault, file=sys.stderr)
        return fault.exit_code
    return 0


def whole_number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, and is {text}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
