#!/usr/bin/env python3
"""Where every byte is through one real step: forecast beside measured, a picture, and who made the largest tensors.

    scripts/profile_memory.py recipes/medical.toml --demo
    scripts/profile_memory.py my.toml --set data.max_tokens=4096 --output profile
    scripts/profile_memory.py my.toml --set model.base=configs/Llama-3.1-8B --random-weights

Plans, loads and attaches as `qtune run` would, runs the largest batch once (forward, loss, backward, clipping,
optimizer) and counts every tensor of it. Leaves in the output folder:

    memory_profile.png   live bytes by part through the step, its phases, and the forecast's peak as a line
    timeline.txt         the same as text
    profile.json         every figure
    snapshot.pickle      on CUDA: the allocator's history, for https://pytorch.org/memory_viz

Costs: the step takes several times as long as one that is not counted. With --random-weights the base is only a folder
with a config.json: its weights are made at random and quantised one by one, and the batch is full sequences of random
tokens. Refuses what `qtune run` refuses, and a missing matplotlib (the extra `plots`).
"""

import argparse
import dataclasses
import importlib.util
import itertools
import json
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from accelerate import init_empty_weights
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.integrations import replace_with_bnb_linear
from transformers.quantizers.base import get_keys_to_not_convert

from qtune import logs
from qtune.data.packing import PackedRow, collate, packed_rows, seq_lengths
from qtune.data.prepare import prepare
from qtune.data.rows import NOT_TRAINED
from qtune.errors import MachineError, QtuneError, RunFolderError, how_to_install
from qtune.hardware import find_device
from qtune.memory import (
    fused_cross_entropy,
    fused_layers,
    memory_tracker,
    mixture_of_experts,
    nf4,
    packed_attention,
    packed_experts,
    packed_mixers,
)
from qtune.memory.engine import Engine
from qtune.memory.gradient_checkpointing import find_layers
from qtune.memory.memory_parts import PASSING_PARTS, STANDING_PARTS
from qtune.memory.memory_report import Ledger
from qtune.memory.memory_tracker import LiveBytes, Peak
from qtune.memory.oom_recovery import Recovery
from qtune.memory.techniques import Techniques
from qtune.memory.techniques.weight_streaming import spread
from qtune.memory.weight_streaming import frozen_tensors
from qtune.model import adapter, base
from qtune.model.loaded import Loaded, autocast
from qtune.model.tokenizer import load_tokenizer
from qtune.plan.plan import Plan
from qtune.plan.planner import decide
from qtune.plan.suggestions import refuse_unless_it_fits
from qtune.plan.workload import Work, heaviest_first
from qtune.recipe import load, shipped_recipes
from qtune.recipe.schema import Model, Recipe
from qtune.rundir import is_used
from qtune.train.dry_run import as_after_a_step, count_what_is_there, finish_step
from qtune.train.learner import Learner
from qtune.train.rows import TrainingRows
from qtune.train.trainer import MeteredTrainer, sft_config
from qtune.units import format_bytes

Batch = dict[str, Any]
Loss = Callable[[Batch], torch.Tensor]

PLAIN = Techniques()
PARTS = (*STANDING_PARTS, *PASSING_PARTS)
# One hue for what is frozen, one for what is trained, one for what waits for the backward pass, one for what passes.
COLOURS = {
    "base": "#1f4e79",
    "streamed layers": "#3a75a8",
    "embedding": "#6ba3d0",
    "head": "#a3c9e8",
    "adapter": "#2e6b3a",
    "gradients": "#5fa169",
    "optimizer": "#a5d1a9",
    "checkpoints": "#7a4f9c",
    "kept attention": "#b48fd1",
    "layer workspace": "#e08a1e",
    "dequantised weights": "#c0392b",
    "loss": "#f2c14e",
    "batch": "#8c8c8c",
}
UNKNOWN_COLOUR = "#c8c8c8"
LETTERS = {
    "base": "B",
    "streamed layers": "S",
    "embedding": "E",
    "head": "H",
    "adapter": "a",
    "gradients": "g",
    "optimizer": "o",
    "checkpoints": "c",
    "kept attention": "k",
    "layer workspace": "w",
    "dequantised weights": "d",
    "loss": "l",
    "batch": "b",
}
TEXT_ROWS, TEXT_CELLS, SHOWN_TENSORS, FILE_COLUMNS = 48, 60, 12, 170
PICTURE_COLUMNS = 900  # at most one for each dot, or peaks between two dots would fade
SNAPSHOT_EVENTS = 200_000
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit,
    "adamw_8bit": bitsandbytes.optim.AdamW8bit,
    "adamw": torch.optim.AdamW,
}


@dataclass(frozen=True)
class Stage:
    """A live model with its techniques on, and what a step of it needs."""

    model: PeftModel
    engine: Engine
    optimizer: torch.optim.Optimizer
    loss_of: Loss


@dataclass(frozen=True)
class Profile:
    """What one step held. `timeline` has a phase and the device's bytes by part for every allocation; `largest` the
    tensors at the peak as (bytes, part, shape, dtype, place). `allocated_bytes` is the allocator's own peak, None
    without one."""

    peaks: dict[str, Peak]
    timeline: list[tuple[str, dict[str, int]]]
    largest: list[tuple[int, str, tuple[int, ...], str, str]]
    allocated_bytes: int | None

    @property
    def peak_phase(self) -> str:
        return max(self.peaks, key=lambda phase: self.peaks[phase].device_bytes)

    @property
    def device(self) -> dict[str, int]:
        """Bytes by part at the highest point of all."""
        return self.peaks[self.peak_phase].device

    @property
    def host(self) -> dict[str, int]:
        """The most bytes of each part that any phase kept in host memory."""
        names = {name for peak in self.peaks.values() for name in peak.host}
        return {name: max(peak.host.get(name, 0) for peak in self.peaks.values()) for name in names}


# ---- the model


def random_weights(
    config: PreTrainedConfig,
    settings: Model,
    device: str,
    compute_dtype: str,
    techniques: Techniques = PLAIN,
    is_plain: bool = False,
) -> PreTrainedModel:
    """A frozen model of this shape with random weights, its linears and experts in NF4 if `settings` say so.

    One weight at a time is made in 16 bits, on `device`. Layers that `techniques` stream leave it as soon as they are
    made. The same call gives the same weights. `is_plain`: as transformers makes it, with nothing of qtune in it.
    """
    packed_attention.register()
    dtype = getattr(torch, compute_dtype)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=dtype,
            attn_implementation="sdpa" if is_plain else packed_attention.NAME,
            trust_remote_code=settings.trust_remote_code,
        )
    model.tie_weights()
    double = settings.double_quantization
    if settings.quantization == "nf4":
        quantization = nf4.config(settings.double_quantization, dtype)
        apart = [*get_keys_to_not_convert(model), *nf4.multiplied_by_hand(type(model))]
        model = replace_with_bnb_linear(model, modules_to_not_convert=apart, quantization_config=quantization)
        model.is_loaded_in_4bit = True  # peft and trl ask for it
    torch.manual_seed(0)
    layers = find_layers(model)
    streamed = {id(layers[i]) for i in spread(techniques.streamed_layers, len(layers))}
    made: dict[int, torch.nn.Parameter] = {}
    for module in _children_first(model):
        stacked = _stacked(module) if settings.quantization == "nf4" and not is_plain else ()
        _fill(module, stacked, double, device, made)
        if id(module) in streamed:
            for tensor, put in frozen_tensors(module):
                put(tensor.to("cpu"))
    model.requires_grad_(False)
    model.config.use_cache = False
    nf4.keep_weights_as_quantised(model)
    if not is_plain:
        mixture_of_experts.install(model)
        packed_attention.install(model)
        packed_mixers.install(model)
        fused_layers.install(model)
        fused_cross_entropy.install(model)
    return model


def _children_first(module: torch.nn.Module) -> list[torch.nn.Module]:
    return [found for child in module.children() for found in _children_first(child)] + [module]


def _stacked(module: torch.nn.Module) -> Sequence[str]:
    """Names of the parameters of `module` that hold the matrices of several experts."""
    is_packed = any(packed_experts.expert_modules(module)) and packed_experts.refusal(module) is None
    return packed_experts.stacked_names(module) if is_packed else ()


def _fill(
    module: torch.nn.Module, stacked: Sequence[str], double: bool, device: str, made: dict[int, torch.nn.Parameter]
) -> None:
    """Real values for the meta parameters of one module, the `stacked` ones in NF4; a tied weight is made once."""
    for name, parameter in list(module._parameters.items()):
        if parameter is None or not parameter.is_meta:
            continue
        if id(parameter) in made:
            module._parameters[name] = made[id(parameter)]
            continue
        if name in stacked:
            matrices = (_random(parameter.shape[1:], parameter.dtype, device) for _ in range(parameter.shape[0]))
            value = packed_experts.pack(matrices, parameter.shape, double)
        elif isinstance(module, Linear4bit) and name == "weight":
            shape = (module.out_features, module.in_features)
            weight = _random(shape, module.compute_dtype, device)
            value = Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=double).to(device)
            module.quant_state = value.quant_state
        elif parameter.ndim < 2:
            fill = 1.0 if name == "weight" else 0.0
            value = torch.nn.Parameter(torch.full(parameter.shape, fill, dtype=parameter.dtype, device=device))
        else:
            value = torch.nn.Parameter(_random(parameter.shape, parameter.dtype, device))
        made[id(parameter)] = module._parameters[name] = value
    for name, buffer in list(module._buffers.items()):
        if buffer is not None:
            module._buffers[name] = buffer.to(device)


def _random(shape: Sequence[int], dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device=device).normal_(std=0.02)


def set_up(loaded: PreTrainedModel, recipe: Recipe, techniques: Techniques, compute_dtype: str, device: str) -> Stage:
    """Adapter, techniques and optimizer on `loaded`, as a run puts them there. Its loss is the tiled one."""
    model = adapter.attach(loaded, recipe.lora, recipe.train.seed)
    adapter.use_master_dtype(model, recipe.lora.master_dtype)
    engine = Engine(model)
    engine.switch_to(techniques)
    model.train()
    optimizer = OPTIMIZERS[recipe.train.optimizer](adapter.trained_parameters(model), lr=recipe.train.learning_rate)

    def loss_of(batch: Batch) -> torch.Tensor:
        with autocast(device, compute_dtype):
            output = model(**batch, fused_loss=True)
        loss: torch.Tensor = output.nats / output.tokens
        return loss

    return Stage(model, engine, optimizer, loss_of)


def with_trl_loss(stage: Stage, recipe: Recipe, plan: Plan, rows: Sequence[PackedRow], folder: Path) -> Stage:
    """The same with trl's loss, which a run takes for a head that scales, caps or biases its logits."""
    loaded = Loaded(stage.model, any_tokenizer(), plan.device.name, plan.compute_dtype)
    learner = Learner(loaded, stage.engine, Recovery(), Ledger.begin(plan.device))
    trainer = MeteredTrainer(
        learner,
        sft_config(recipe, plan, folder),
        recipe.train,
        TrainingRows(rows),
        None,
    )
    adapter.use_master_dtype(stage.model, recipe.lora.master_dtype)
    trainer.begin_step("The step")
    return dataclasses.replace(stage, loss_of=trainer.loss_of)


def any_tokenizer() -> PreTrainedTokenizerFast:
    """What trl's trainer asks for although the rows are tokenised."""
    vocabulary = {"<pad>": 0, "<eos>": 1}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>")),
        pad_token="<pad>",
        eos_token="<eos>",
    )


# ---- the step


def random_rows(count: int, tokens: int, vocabulary: int) -> list[PackedRow]:
    """Sequences of one document of random tokens each, all of them labels."""
    draw = torch.Generator().manual_seed(0)
    every = torch.randint(0, vocabulary, (count, tokens), generator=draw).tolist()
    return [{"input_ids": ids, "labels": list(ids), "seq_lengths": [tokens]} for ids in every]


def batch_of(rows: Sequence[PackedRow], device: str) -> Batch:
    """`rows` as one micro-batch on `device`."""
    found = collate(rows)
    return {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in found.items()}


def step(stage: Stage, batch: Batch) -> float:
    """One real optimizer step; its loss."""
    loss = stage.loss_of(batch)
    loss.backward()
    value = loss.item()
    finish_step(stage.model, stage.optimizer)
    stage.model.zero_grad()
    return value


def count_step(stage: Stage, batch: Batch, accumulates: bool, counter: LiveBytes) -> None:
    """One step on `batch` under `counter`, as it is from the second step on: the optimizer's state is there, and so are
    the gradients if they outlive a pass. Gradients are dropped afterwards."""
    as_after_a_step(stage.model, stage.optimizer, accumulates)
    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda p: memory_tracker.mark([p.grad], "gradients"))
        for parameter in adapter.trained_parameters(stage.model)
    ]
    with counter:
        count_what_is_there(counter, stage.model, stage.engine, stage.optimizer, batch)
        counter.enter_phase("forward")
        loss = stage.loss_of(batch)
        counter.enter_phase("backward")
        loss.backward()
        counter.enter_phase("step")
        finish_step(stage.model, stage.optimizer)
    for hook in hooks:
        hook.remove()
    stage.model.zero_grad()
    counter.peaks.pop("load", None)


def profile(stage: Stage, batch: Batch, accumulates: bool, snapshot: Path | None) -> Profile:
    """One counted step, with its timeline and the places that made its tensors; on a card the allocator's view too."""
    if snapshot is not None:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.memory._record_memory_history(max_entries=SNAPSHOT_EVENTS)
    counter = LiveBytes(with_timeline=True, with_places=True)
    count_step(stage, batch, accumulates, counter)
    allocated = None
    if snapshot is not None:
        allocated = torch.cuda.max_memory_allocated()
        torch.cuda.memory._dump_snapshot(str(snapshot))
        torch.cuda.memory._record_memory_history(enabled=None)
    timeline = [moment for moment in counter.timeline or [] if moment[0] != "load"]
    return Profile(counter.peaks, timeline, counter.largest, allocated)


# ---- what is shown


def parts_in(*held: dict[str, int]) -> list[str]:
    """The parts that any of these has bytes of, in the order they are drawn."""
    there = {name for parts in held for name, size in parts.items() if size}
    return [name for name in PARTS if name in there] + sorted(there - set(PARTS))


def percent_off(forecast: int, measured: int) -> str:
    """`+1.2 %`: by how much the forecast is above what was measured."""
    return f"{100 * (forecast - measured) / measured:+.2f} %" if measured else ""


def beside_forecast(title: str, forecast: dict[str, int], measured: dict[str, int]) -> Table:
    """Forecast and measured bytes by part, and in all."""
    table = Table(title, "forecast", "measured", "forecast is off by", box=None, padding=(0, 2, 0, 0))
    for column in table.columns[1:]:
        column.justify = "right"
    for name in parts_in(forecast, measured):
        one, other = forecast.get(name, 0), measured.get(name, 0)
        table.add_row(name, exactly(one), exactly(other), percent_off(one, other))
    one, other = sum(forecast.values()), sum(measured.values())
    table.add_row("in all", exactly(one), exactly(other), percent_off(one, other), style="bold")
    return table


def exactly(size: int) -> str:
    """MiB to two places: differences of a percent must show."""
    return f"{size / 1024**2:,.2f} MiB"


def largest_table(largest: Sequence[tuple[int, str, tuple[int, ...], str, str]]) -> Table:
    """The largest tensors at the peak; those alike in everything are one row."""
    table = Table("at the peak", "tensors", "part", "shape", "dtype", "made by", box=None, padding=(0, 2, 0, 0))
    alike: dict[tuple[int, str, tuple[int, ...], str, str], int] = {}
    for tensor in largest:
        alike[tensor] = alike.get(tensor, 0) + 1
    for (size, part, shape, dtype, place), count in list(alike.items())[:SHOWN_TENSORS]:
        made_by = "stood before the step" if part in STANDING_PARTS or part == "batch" else place
        table.add_row(format_bytes(count * size), f"{count}", part, "x".join(map(str, shape)), dtype, made_by)
    return table


def slices(timeline: Sequence[tuple[str, dict[str, int]]], count: int) -> list[tuple[str, dict[str, int]]]:
    """The highest moment of each of `count` stretches of the step."""
    edges = [round(i * len(timeline) / count) for i in range(count + 1)]
    stretches = [timeline[a:b] for a, b in itertools.pairwise(edges) if b > a]
    return [max(stretch, key=lambda moment: sum(moment[1].values())) for stretch in stretches]


def text_timeline(found: Profile, forecast_bytes: int) -> str:
    """One line for each stretch of the step: its phase, its highest bytes, and a bar with one letter a part."""
    moments = slices(found.timeline, TEXT_ROWS)
    highest = max(forecast_bytes, *(sum(parts.values()) for _, parts in moments))
    names = parts_in(*(parts for _, parts in moments))
    key = "  ".join(f"{LETTERS.get(name, '?')} {name}" for name in names)
    lines = [f"{key}  | forecast peak {exactly(forecast_bytes)}", ""]
    mark = round(TEXT_CELLS * forecast_bytes / highest)
    for phase, parts in moments:
        bar, so_far = "", 0
        for name in names:
            so_far += parts.get(name, 0)
            bar += LETTERS.get(name, "?") * (round(TEXT_CELLS * so_far / highest) - len(bar))
        bar = bar.ljust(TEXT_CELLS + 1)
        lines.append(f"{phase:<12} {exactly(sum(parts.values())):>15}  {bar[:mark]}|{bar[mark + 1 :]}".rstrip())
    return "\n".join(lines) + "\n"


def phase_spans(timeline: Sequence[tuple[str, dict[str, int]]]) -> list[tuple[str, int, int]]:
    """(name, first, end) of each phase in the order of the step; `backward 7` and the others are one."""
    spans: list[tuple[str, int, int]] = []
    for index, (phase, _) in enumerate(timeline):
        name = phase.split()[0]
        if spans and spans[-1][0] == name:
            spans[-1] = (name, spans[-1][1], index + 1)
        else:
            spans.append((name, index, index + 1))
    return spans


def draw(found: Profile, forecast_bytes: int, title: str, subtitle: str, target: Path) -> None:
    """The stacked areas as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timeline = slices(found.timeline, PICTURE_COLUMNS)
    names = parts_in(*(parts for _, parts in timeline))
    highest = max(forecast_bytes, *(sum(parts.values()) for _, parts in timeline))
    unit, size = ("GiB", 1024**3) if highest >= 2 * 1024**3 else ("MiB", 1024**2)
    across = list(range(len(timeline)))
    figure, axes = pyplot.subplots(figsize=(11, 6), dpi=120)
    axes.stackplot(
        across,
        [[parts.get(name, 0) / size for _, parts in timeline] for name in names],
        labels=names,
        colors=[COLOURS.get(name, UNKNOWN_COLOUR) for name in names],
        linewidth=0,
        antialiased=False,
        step="mid",
    )
    sums = [sum(parts.values()) for _, parts in timeline]
    at = max(across, key=lambda index: sums[index])
    axes.axhline(forecast_bytes / size, color="#222222", linestyle="--", linewidth=1.2)
    axes.plot([at], [sums[at] / size], marker="v", color="#222222", markersize=7, linestyle="none")
    axes.set_ylim(0, 1.18 * highest / size)
    axes.set_xlim(0, len(timeline) - 1)
    for name, first, end in phase_spans(timeline):
        if first:
            axes.axvline(first, color="#222222", linewidth=0.8, alpha=0.6)
        is_narrow = end - first < len(timeline) / 30 and end < len(timeline)
        place = (end if is_narrow else (first + end) / 2, 1.145 * highest / size)
        side = "left" if is_narrow else "center"
        axes.text(*place, name, ha=side, va="top", rotation=90 if is_narrow else 0, fontsize=10, weight="bold")
    axes.set_xlabel(f"{len(found.timeline):,} allocations, in the order of the step")
    axes.set_xticks([])
    axes.set_ylabel(f"live on the device, {unit}")
    peaks = f"peak: {forecast_bytes / size:,.1f} {unit} forecast (dashed), {sums[at] / size:,.1f} measured (triangle)"
    below = [*textwrap.wrap(subtitle, 130), peaks]
    axes.set_title(title + "\n" * len(below), fontsize=12, weight="bold", loc="left")
    axes.text(0, 1.015, "\n".join(below), transform=axes.transAxes, fontsize=9, color="#444444")
    axes.grid(axis="y", linewidth=0.4, alpha=0.4)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(target)
    pyplot.close(figure)


# ---- the story


def prepared_plan(recipe: Recipe, is_random: bool) -> tuple[Plan, list[PackedRow]]:
    """The plan for this machine, and the rows it trains on."""
    device = find_device()
    if is_random:
        config = base.read_config_alone(recipe.model)
        tokens, count = recipe.data.max_tokens, recipe.train.micro_batch
        rows = random_rows(count, tokens, config.get_text_config().vocab_size)
        return decide(recipe, device, config, Work.of_rows(rows)), rows
    config = base.read_config(recipe.model)
    prepared = prepare(recipe, load_tokenizer(recipe.model))
    rows = packed_rows(prepared.train, prepared.train_packs)
    return decide(recipe, device, config, Work.of_rows(rows)), rows


def as_json(recipe: Recipe, plan: Plan, found: Profile, batch: Batch) -> dict[str, Any]:
    """Every figure of a profile."""
    return {
        "recipe": recipe.name,
        "base": recipe.model.base,
        "device": plan.device.label,
        "compute_dtype": plan.compute_dtype,
        "tokens": batch["input_ids"].numel(),
        "documents": list(batch["document_lengths"]),
        "labelled": int((batch["labels"] != NOT_TRAINED).sum()),
        "techniques": dataclasses.asdict(plan.techniques),
        "forecast": dataclasses.asdict(plan.forecast),
        "peak_phase": found.peak_phase,
        "device_bytes": found.device,
        "host_bytes": found.host,
        "allocated_bytes": found.allocated_bytes,
        "phases": {phase: peak.device_bytes for phase, peak in found.peaks.items()},
        "largest": [
            dict(zip(("bytes", "part", "shape", "dtype", "made_by"), tensor, strict=True)) for tensor in found.largest
        ],
    }


def profile_recipe(recipe: Recipe, is_random: bool, folder: Path, console: Console) -> None:
    """Run the step and leave everything in `folder`. Raises a UserError for what cannot be profiled, DoesNotFit for a
    plan that a run would refuse."""
    base.quiet_libraries()
    plan, rows = prepared_plan(recipe, is_random)
    refuse_unless_it_fits(recipe, plan)
    make_folder(folder)
    device = plan.device.name
    if is_random:
        config = base.read_config_alone(recipe.model)
        loaded = random_weights(config, recipe.model, device, plan.compute_dtype, plan.techniques)
    else:
        loaded = base.load_base(recipe.model, device, plan.compute_dtype, plan.techniques)
    stage = set_up(loaded, recipe, plan.techniques, plan.compute_dtype, device)
    if not fused_cross_entropy.suits(stage.model):
        stage = with_trl_loss(stage, recipe, plan, rows, folder)
    batch = batch_of([rows[i] for i in heaviest_first(seq_lengths(rows))[: plan.micro_batch].tolist()], device)
    snapshot = folder / "snapshot.pickle" if plan.device.is_card else None
    found = profile(stage, batch, plan.gradient_accumulation > 1, snapshot)

    outside = ("slack", "context")
    forecast = {part: size for part, size in plan.forecast.device.items() if part not in outside}
    forecast_host = {part: size for part, size in plan.forecast.host.items() if part in PARTS}
    (folder / "profile.json").write_text(json.dumps(as_json(recipe, plan, found, batch), indent=2), encoding="utf-8")
    (folder / "timeline.txt").write_text(text_timeline(found, plan.forecast.allocated_bytes), encoding="utf-8")
    title = f"{recipe.name}: one step of {batch['input_ids'].numel():,} tokens"
    draw(found, plan.forecast.allocated_bytes, title, said(plan), folder / "memory_profile.png")
    console.print(said(plan) + "\n")
    console.print(f"highest in: {plan.forecast.peak_phase} (forecast), {found.peak_phase} (measured)")
    console.print(beside_forecast("device", forecast, found.device))
    if found.allocated_bytes is not None:
        console.print(f"torch's allocator says {exactly(found.allocated_bytes)}")
    if forecast_host or found.host:
        console.print()
        console.print(beside_forecast("host", forecast_host, found.host))
    console.print()
    console.print(largest_table(found.largest))
    console.print(f"\n{folder / 'memory_profile.png'}, timeline.txt, profile.json")
    if snapshot is not None:
        console.print(f"{snapshot}: open it at https://pytorch.org/memory_viz")


def said(plan: Plan) -> str:
    """The techniques that are on, in a line."""
    on = [rung.name for rung in plan.rungs if rung.is_on]
    return f"{plan.device.label}, {plan.compute_dtype}; techniques: {', '.join(on) if on else 'none'}"


def make_folder(folder: Path) -> None:
    if is_used(folder):
        raise RunFolderError(f"{folder}: is not empty, and nothing is overwritten. Name another --output.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise RunFolderError(f"{folder}: cannot be made ({fault.strerror}). Name another --output.") from None


def wide_console() -> Console:
    """Standard output; wide enough for the tables where it is a file."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else FILE_COLUMNS)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a recipe file, or the name of a shipped one such as medical")
    parser.add_argument("--demo", action="store_true", help="use what the recipe's [demo] says")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting")
    parser.add_argument("--random-weights", action="store_true", help="the base is a folder with a config.json alone")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="new folder; default runs/profile-NAME")
    options = parser.parse_args(arguments)
    try:
        recipe = load.load(
            shipped_recipes.find(options.recipe), options.set, options.demo, needs_weights=not options.random_weights
        )
        if importlib.util.find_spec("matplotlib") is None:
            raise MachineError(f"The picture needs matplotlib, which is not installed: {how_to_install('plots')}")
        logs.hold()
        folder = options.output or Path("runs") / f"profile-{recipe.name}"
        profile_recipe(recipe, options.random_weights, folder, wide_console())
    except QtuneError as fault:
        print(fault, file=sys.stderr)
        return fault.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
