"""One real step on the CPU, every byte counted, beside what was forecast for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import bitsandbytes
import torch

from qtune.data.packing import collate
from qtune.hardware import find_device
from qtune.memory import pair_loss
from qtune.memory.engine import Engine
from qtune.memory.techniques import Techniques
from qtune.model import adapter, base
from qtune.model.loaded import autocast
from qtune.plan.activation_memory import forecaster
from qtune.plan.forecast import Forecast, Forecaster
from qtune.plan.workload import BatchShape
from qtune.recipe.schema import Data, Lora, Memory, Model, Recipe, Train
from qtune.train.dry_run import Rehearsal, rehearse
from qtune.train.objectives import OBJECTIVES
from qtune.train.optimizers import OPTIMIZERS

OF_TRANSFORMERS = {
    "adamw": torch.optim.AdamW,
    "adamw_8bit": bitsandbytes.optim.AdamW8bit,
    "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit,
}
UNDO = "undo copy of the adapter"  # taken by the trainer's optimizer step, which a rehearsal does without


def recipe_for(folder: Path | str, memory: dict | None = None, lora: dict | None = None, **train: object) -> Recipe:
    settings = dict(train)
    model = {"quantization": settings.pop("quantization", "nf4")}
    return Recipe(
        name="t",
        model=Model(base=str(folder), **model),
        lora=Lora(**{"rank": 8, **(lora or {})}),
        data=Data(train="rows.jsonl"),
        train=Train(**settings),
        memory=Memory(**(memory or {})),
    )


def on_this_machine(recipe: Recipe, dtype: str) -> Forecaster:
    return forecaster(base.read_config(recipe.model), recipe, dtype, card=None, context_bytes=0)


def packed(lengths: Sequence[int], vocabulary: int) -> dict:
    """A batch of documents of these lengths, every second token trained on."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (sum(lengths),), generator=generator).tolist()
    labels = [token if i % 2 else -100 for i, token in enumerate(ids)]
    return collate([{"input_ids": ids, "labels": labels, "seq_lengths": list(lengths)}])


@dataclass
class RealModel:
    """A loaded model whose techniques can only be climbed."""

    recipe: Recipe
    dtype: str

    def __post_init__(self) -> None:
        loaded = base.load_base(self.recipe.model, "cpu", self.dtype)
        self.model = adapter.attach(loaded, self.recipe.lora, 0)
        adapter.use_master_dtype(self.model, self.recipe.lora.master_dtype)
        self.engine = Engine(self.model)

    def step(self, techniques: Techniques, batch: dict, accumulates: bool) -> Rehearsal:
        self.engine.switch_to(techniques)
        objective = OBJECTIVES[self.recipe.train.objective]
        name = self.recipe.train.optimizer
        made, settings = OPTIMIZERS[name].made_with(1e-3, 9) or (OF_TRANSFORMERS[name], {"lr": 1e-3})
        optimizer = made(list(adapter.trained_parameters(self.model)), **settings)

        def loss_of(batch: dict) -> torch.Tensor:
            with autocast("cpu", self.dtype):
                if objective.learns_pairs:
                    pairs = pair_loss.pairs_of(self.model, batch, objective, self.model.disable_adapter)
                    return pair_loss.loss_of(pairs, objective, 0.1, torch.tensor(pair_loss.totals_of([batch])))
                return self.model(**batch, fused_loss=True).nats

        return rehearse(self.model, self.engine, optimizer, batch, loss_of, accumulates, find_device())


def differences(forecast: Forecast, found: Rehearsal) -> dict[str, int]:
    """Bytes by part by which the forecast is off at the measured peak."""
    measured = found.peaks[found.peak_phase].device
    names = forecast.device.keys() | measured.keys()
    return {name: forecast.device.get(name, 0) - measured.get(name, 0) for name in sorted(names)}


def assert_equal(forecast: Forecast, found: Rehearsal, tolerance: float = 0.002) -> None:
    """Device bytes within `tolerance`, host bytes exactly."""
    error = forecast.device_bytes / found.device_bytes - 1
    assert abs(error) <= tolerance, (f"{100 * error:+.2f} %", differences(forecast, found), forecast.phases)
    on_host = max(peak.host_bytes for peak in found.peaks.values())
    assert forecast.host_bytes - forecast.host.get(UNDO, 0) == on_host, (forecast.host, on_host)


def compare(
    folder: Path | str,
    dtype: str,
    ladder: Sequence[Techniques],
    lengths: Sequence[int],
    accumulates: bool = True,
    tolerance: float = 0.005,
    lora: dict | None = None,
    **train: object,
) -> None:
    """Forecast and count a step with each of `ladder`, which only climbs."""
    recipe = recipe_for(folder, lora=lora, **train)
    forecasts, real = on_this_machine(recipe, dtype), RealModel(recipe, dtype)
    vocabulary = base.read_config(recipe.model).get_text_config().vocab_size
    batch = packed(lengths, min(250, vocabulary))
    if recipe.train.learns_pairs:
        batch = pair_loss.laid_out(batch, OBJECTIVES[recipe.train.objective])
    asked = BatchShape(tuple(lengths), int((batch["labels"] != -100).sum()))
    for techniques in ladder:
        forecast = forecasts.forecast(techniques, asked, accumulates)
        assert_equal(forecast, real.step(techniques, batch, accumulates), tolerance)
