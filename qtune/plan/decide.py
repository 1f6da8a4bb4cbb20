"""Recipe + device + data -> Plan: every open choice settled before anything is loaded, each with its reason."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from qtune.memory.device import Device
from qtune.recipe.schema import Recipe

EVALUATIONS = 10


@dataclass(frozen=True)
class Choice:
    """One settled setting, as text, and why it is what it is."""

    name: str
    value: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """Everything a run needs to know besides the recipe and the rows."""

    device: Device
    compute_dtype: str
    steps: int
    warmup_steps: int
    eval_every: int
    choices: tuple[Choice, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def decide(recipe: Recipe, device: Device, train_packs: int) -> Plan:
    """The plan for `train_packs` sequences on `device`."""
    train = recipe.train
    compute_dtype, why_compute = _compute_dtype(recipe, device)
    steps, why_steps = _steps(recipe, train_packs)
    eval_every, why_eval = _eval_every(recipe, steps)
    warmup_steps = math.ceil(train.warmup_fraction * steps)
    choices = (
        Choice("device", device.label, "the first CUDA card" if device.is_cuda else "torch sees no CUDA card"),
        Choice("base", _held_as(recipe), "model.quantization"),
        Choice("compute", compute_dtype, why_compute),
        Choice("adapter", _adapter(recipe), "lora"),
        Choice("steps", f"{steps:,}", why_steps),
        Choice("sequences a step", f"{train.micro_batch * train.gradient_accumulation}", _batch(recipe)),
        Choice("learning rate", f"{train.learning_rate:g}", f"{train.schedule}, after {warmup_steps} steps of warm-up"),
        Choice("optimizer", train.optimizer, "train.optimizer"),
        Choice("recomputed layers", "all" if train.gradient_checkpointing else "none", "train.gradient_checkpointing"),
        Choice("packing", "yes" if recipe.data.packing else "no", "data.packing"),
        Choice("held-out loss", f"every {eval_every:,} steps", why_eval),
    )
    return Plan(device, compute_dtype, steps, warmup_steps, eval_every, choices)


def _adapter(recipe: Recipe) -> str:
    lora = recipe.lora
    scale = lora.alpha / (math.sqrt(lora.rank) if lora.rslora else lora.rank)
    return f"{'DoRA' if lora.dora else 'LoRA'}, rank {lora.rank}, scale {scale:.3g}, in {lora.master_dtype}"


def _batch(recipe: Recipe) -> str:
    train = recipe.train
    return (
        f"micro_batch {train.micro_batch} x gradient_accumulation {train.gradient_accumulation},"
        f" each of at most {recipe.data.max_tokens:,} tokens"
    )


def _compute_dtype(recipe: Recipe, device: Device) -> tuple[str, str]:
    asked = recipe.model.compute_dtype
    if asked != "auto":
        return asked, "model.compute_dtype"
    if device.compute_dtype == "bfloat16":
        return "bfloat16", f"{device.label} multiplies bfloat16 itself"
    return device.compute_dtype, f"{device.label} has no bfloat16 arithmetic"


def _held_as(recipe: Recipe) -> str:
    if recipe.model.quantization == "none":
        return "16 or 32 bits, not quantised"
    return "NF4, double quantisation" if recipe.model.double_quantization else "NF4"


def _steps(recipe: Recipe, train_packs: int) -> tuple[int, str]:
    """Optimizer steps; the last step of an epoch takes what sequences are left."""
    train = recipe.train
    per_epoch = math.ceil(math.ceil(train_packs / train.micro_batch) / train.gradient_accumulation)
    steps = math.ceil(train.epochs * per_epoch)
    if train.max_steps is not None and train.max_steps < steps:
        return train.max_steps, "train.max_steps"
    return steps, f"{train.epochs:g} epochs of {per_epoch:,} steps over {train_packs:,} sequences"


def _eval_every(recipe: Recipe, steps: int) -> tuple[int, str]:
    if recipe.train.eval_every is not None:
        return recipe.train.eval_every, "train.eval_every"
    return max(1, math.ceil(steps / EVALUATIONS)), f"{EVALUATIONS} times in the run"
