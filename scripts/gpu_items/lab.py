"""Where the items run: on the card with the real shapes, or in a rehearsal on the processor with tiny ones."""

import dataclasses
import gc
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from profile_memory import Stage, any_tokenizer, batch_of, count_step, random_rows, random_weights, set_up
from transformers import AutoConfig, PreTrainedConfig

from qtune.data.packing import PackedRow
from qtune.events import Event, StepDone
from qtune.hardware import Device
from qtune.memory.memory_report import Ledger
from qtune.memory.memory_tracker import LiveBytes
from qtune.memory.oom_recovery import free_memory, is_out_of_memory, let_go
from qtune.memory.techniques import STEPS, Techniques
from qtune.model import adapter
from qtune.model.loaded import Loaded
from qtune.plan import activation_memory
from qtune.plan.forecast import Forecast, Forecaster
from qtune.plan.plan import Plan
from qtune.plan.planner import decide
from qtune.plan.workload import BatchShape, Work
from qtune.recipe.schema import Data, Lora, Memory, Model, Recipe, Train
from qtune.train.dry_run import finish_step
from qtune.train.learner import Learner
from qtune.train.loop import TrainingSession
from qtune.train.rows import TrainingRows

from .shapes import described

Figures = dict[str, Any]

RANK = 16
TINY_TOKENS_DIVISOR = 128
PASSES = 2
PLAIN = Techniques()


@dataclass(frozen=True)
class Lab:
    """`device` as `hardware.find_device` finds it; in a rehearsal shapes, lengths and lists are cut short."""

    device: Device
    is_rehearsed: bool

    # ---- what is measured on

    def config(self, shape: str, layers: int | None = None) -> PreTrainedConfig:
        return AutoConfig.for_model(**described(shape, self.is_rehearsed, layers))

    def some(self, choices: Sequence[Any], few: int = 1) -> Sequence[Any]:
        """All of `choices`; in a rehearsal the first `few`."""
        return choices[:few] if self.is_rehearsed else choices

    def tokens(self, count: int) -> int:
        return max(8, count // TINY_TOKENS_DIVISOR) if self.is_rehearsed else count

    def forecaster(self, shape: str, recipe: Recipe | None = None, layers: int | None = None) -> Forecaster:
        device = self.device
        return activation_memory.forecaster(
            self.config(shape, layers),
            recipe or recipe_of(),
            device.compute_dtype,
            device.capability,
            device.outside_bytes,
        )

    def build(self, forecaster: Forecaster, techniques: Techniques) -> Stage:
        """A fresh model of the forecaster's shape with random weights."""
        name, dtype, recipe = self.device.name, self.device.compute_dtype, forecaster.recipe
        loaded = random_weights(forecaster.passes.config, recipe.model, name, dtype, techniques)
        return set_up(loaded, recipe, techniques, dtype, name)

    def batch(self, forecaster: Forecaster, tokens: int) -> dict[str, Any]:
        return batch_of(self.rows(forecaster, [tokens]), self.device.name)

    def rows(self, forecaster: Forecaster, lengths: Sequence[int]) -> list[PackedRow]:
        """Documents of random tokens of these lengths, each a row."""
        vocabulary = forecaster.passes.config.get_text_config().vocab_size
        return [random_rows(1, length, vocabulary)[0] for length in lengths]

    def planned(self, forecaster: Forecaster, work: Work, card_bytes: int) -> Plan:
        """What qtune would do with `work` on a card of that size."""
        smaller = replace(self.device, total_bytes=card_bytes, free_bytes=card_bytes)
        return decide(forecaster.recipe, smaller, forecaster.passes.config, work)

    # ---- one step

    def measure(self, stage: Stage, batch: dict[str, Any]) -> Figures:
        """Peak bytes of `PASSES` steps, gradients and optimizer state there before them, and seconds of the last: a
        shape's first run loads its kernels."""
        if not self.device.is_card:
            counter, start = LiveBytes(), time.perf_counter()
            count_step(stage, batch, accumulates=True, counter=counter)
            counted = max(peak.device_bytes for peak in counter.peaks.values())
            return {"allocated_bytes": counted, "reserved_bytes": None, "step_seconds": time.perf_counter() - start}
        for parameter in adapter.trained_parameters(stage.model):
            parameter.grad = torch.zeros_like(parameter)
        stage.optimizer.step()
        self.reset_peak()
        for _ in range(PASSES):
            seconds = self.timed(lambda: self._accumulated_step(stage, batch))
        stage.model.zero_grad()
        return {
            "allocated_bytes": torch.cuda.max_memory_allocated(),
            "reserved_bytes": torch.cuda.max_memory_reserved(),
            "step_seconds": seconds,
        }

    def _accumulated_step(self, stage: Stage, batch: dict[str, Any]) -> None:
        stage.loss_of(batch).backward()
        finish_step(stage.model, stage.optimizer)

    def timed(self, act: Callable[[], object]) -> float:
        """Seconds that `act` takes, until the card has done all of it."""
        self.synchronize()
        start = time.perf_counter()
        act()
        self.synchronize()
        return time.perf_counter() - start

    def try_to_measure(self, stage: Stage, batch: dict[str, Any], most_bytes: int | None = None) -> Figures:
        """The same; `ran` is False where memory ran out, or on the processor where `most_bytes` would not have done."""
        try:
            measured = self.measure(stage, batch)
        except Exception as fault:
            if not is_out_of_memory(fault):
                raise
            let_go(fault)
            stage.engine.forget_pass()
            stage.model.zero_grad()
            free_memory()
            return {"ran": False}
        if most_bytes is not None and not self.device.is_card and measured["allocated_bytes"] > most_bytes:
            return {"ran": False}
        return {"ran": True, **measured}

    # ---- training

    def train(self, forecaster: Forecaster, plan: Plan, rows: Sequence[PackedRow]) -> "Trained":
        """`plan` carried out by qtune's own training loop on a model with random weights, no file written."""
        events: list[Event] = []
        ledger = Ledger.begin(self.device)
        loaded = random_weights(
            forecaster.passes.config, forecaster.recipe.model, self.device.name, plan.compute_dtype, plan.techniques
        )
        stage = set_up(loaded, forecaster.recipe, plan.techniques, plan.compute_dtype, self.device.name)
        model = Loaded(stage.model, any_tokenizer(), self.device.name, plan.compute_dtype)
        learner = Learner.of(model, stage.engine, ledger, plan, events.append)
        TrainingSession(forecaster.recipe, plan, learner, TrainingRows(rows), events.append).run()
        return Trained(stage, model, tuple(event for event in events if isinstance(event, StepDone)))

    # ---- the card

    def synchronize(self) -> None:
        if self.device.is_card:
            torch.cuda.synchronize()

    def reset_peak(self) -> None:
        let_memory_go()
        if self.device.is_card:
            torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self.device.is_card else None

    def process_bytes(self) -> int | None:
        """What nvidia-smi says that this process holds; of a container, whose numbers are others, what all hold."""
        if not self.device.is_card:
            return None
        command = ["nvidia-smi", "--query-compute-apps=used_memory", "--format=csv,noheader,nounits"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=10)
        held = [int(line) for line in said.stdout.split() if line.isdigit()]
        return sum(held) * 2**20 if held else None


@dataclass(frozen=True)
class Trained:
    """What a training left: the live model, and every step that it told of."""

    stage: Stage
    loaded: Loaded
    steps: tuple[StepDone, ...]


class limited_to:
    """Inside, torch may take no more than a card of `card_bytes` would leave it."""

    def __init__(self, lab: Lab, card_bytes: int):
        self.lab, self.card_bytes = lab, card_bytes

    def __enter__(self) -> None:
        let_memory_go()
        if self.lab.device.is_card:
            share = (self.card_bytes - self.lab.device.outside_bytes) / self.lab.device.total_bytes
            torch.cuda.set_per_process_memory_fraction(min(1.0, share))

    def __exit__(self, *fault: object) -> None:
        let_memory_go()
        if self.lab.device.is_card:
            torch.cuda.set_per_process_memory_fraction(1.0)


def let_memory_go() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def recipe_of(memory: Memory | None = None, **train: Any) -> Recipe:
    return Recipe(
        name="bench",
        model=Model(base="demo"),
        lora=Lora(rank=RANK, alpha=2 * RANK),
        data=Data(train="none"),
        train=Train(**{"optimizer": "adamw_8bit", **train}),
        memory=memory or Memory(),
    )


def everything(forecaster: Forecaster, is_streamed: bool) -> Techniques:
    """Every technique that the model allows, streaming or not."""
    techniques = PLAIN
    for rung in STEPS:
        if rung.technique not in forecaster.standing.refusals and (is_streamed or rung.technique != "streamed_layers"):
            techniques = rung.up(techniques, forecaster.standing)
    return techniques


def recomputed(forecaster: Forecaster) -> Techniques:
    return Techniques(recomputed_layers=forecaster.layers, recomputed_attention=forecaster.layers)


def on(techniques: Techniques) -> str:
    """`recomputed_layers 32, tile_tokens 1024`: what differs from nothing."""
    off = dataclasses.asdict(PLAIN)
    changed = {name: value for name, value in dataclasses.asdict(techniques).items() if value != off[name]}
    return ", ".join(name if value is True else f"{name} {value}" for name, value in changed.items()) or "none"


def beside(forecast: Forecast, measured: Figures) -> Figures:
    """Forecast and measured bytes, and by what fraction of what was measured the forecast is off."""
    reserved = forecast.allocated_bytes + forecast.device.get("slack", 0)
    row: Figures = {"forecast_bytes": forecast.allocated_bytes, **measured}
    if measured.get("ran", True):
        row["off_fraction"] = forecast.allocated_bytes / measured["allocated_bytes"] - 1
        if measured["reserved_bytes"]:
            row["reserved_off_fraction"] = reserved / measured["reserved_bytes"] - 1
    row["host_forecast_bytes"] = forecast.host_bytes
    return row


def one_document(tokens: int) -> Work:
    return Work((BatchShape.of_one_document(tokens),))


def joined(rows: Sequence[PackedRow]) -> PackedRow:
    """One pack of these documents."""
    return {
        "input_ids": [token for row in rows for token in row["input_ids"]],
        "labels": [label for row in rows for label in row["labels"]],
        "seq_lengths": [length for row in rows for length in row["seq_lengths"]],
    }
