"""Recipe + data + device -> Plan: every open choice settled before anything is loaded, each with its reason."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedConfig

from qtune import cache_dir
from qtune.errors import ModelError
from qtune.hardware import Device
from qtune.lock import Quantization
from qtune.memory.techniques.standing import Standing
from qtune.model import base, lora_variants, nf4_cache
from qtune.model.lora_inits import DEFAULT, LORA_INITS
from qtune.plan import activation_memory, throughput
from qtune.plan.forecast import Forecaster
from qtune.plan.ladder import Budget, Climb, Ladder
from qtune.plan.max_context import STEP_TOKENS, Longest, longest
from qtune.plan.overrides import refuse_impossible
from qtune.plan.plan import Choice, Plan, Settled
from qtune.plan.rung_report import Rung, rungs
from qtune.plan.suggestions import remedies
from qtune.plan.workload import BatchShape, Work
from qtune.plan.world import ALONE, World
from qtune.recipe.schema import HOST_FRACTION, Lora, Recipe, Train
from qtune.train.optimizers import OPTIMIZERS
from qtune.units import MIB, counted, format_count, format_percent, parse_bytes

EVALUATIONS = 10  # points enough to see a loss turn, at a cost that is small beside the run
SPARE_DISK_BYTES = 64 * MIB  # for what is small: the log, the events, the page, the card


def decide(
    recipe: Recipe,
    device: Device,
    config: PreTrainedConfig,
    work: Work,
    settled: Settled | None = None,
    weighs_all: bool = False,
    world: World = ALONE,
) -> Plan:
    """The plan for training on `work` with `device`, here or imagined; a run that goes on has `settled` how. Of several
    ranks it is the plan of one that has this device; steps and packs are those of all.

    `weighs_all`: the plan says of techniques that are off, too, what they would save, which takes seconds. It does so
    of one that does not fit in any case.

    Raises ModelError where transformers cannot build the model that `config` describes, or what the recipe asks for, a
    technique or a beginning of the adapter, cannot be done with it, and MachineError where a technique asks for more
    host memory than there is.
    """
    compute_dtype, why_compute = _compute_dtype(recipe, device)
    _refuse_init(recipe, base.held_as(config, recipe.model))

    def forecaster_of(recipe: Recipe) -> Forecaster:
        forecaster = _forecaster(recipe, device, config, compute_dtype)
        if not world.are_several:
            return forecaster
        seconds = throughput.pass_seconds(forecaster.standing, work, recipe.train.micro_batch, device)
        standing = replace(
            forecaster.standing, ranks=world.size, link_bytes=world.link.bytes_per_second, pass_seconds=seconds
        )
        return replace(forecaster, standing=standing)

    ladder = Ladder(forecaster_of(recipe), work, budget_of(recipe, device, world))
    refuse_impossible(ladder.forecaster, work.heaviest(1), ladder.budget.host_bytes)
    climb = ladder.climb() if settled is None else ladder.stay(settled.techniques, settled.micro_batch)
    told = tuple(rungs(ladder, climb, weighs_all or not climb.fits))
    pace = _pace(recipe, work)
    accumulation = recipe.train.gradient_accumulation * recipe.train.micro_batch // climb.micro_batch
    return Plan(
        device=device,
        compute_dtype=compute_dtype,
        steps=pace.steps,
        warmup_steps=pace.warmup_steps,
        eval_every=pace.eval_every,
        micro_batch=climb.micro_batch,
        gradient_accumulation=accumulation,
        is_assumed=work.is_assumed,
        fits=climb.fits,
        layers=ladder.forecaster.layers,
        techniques=climb.techniques,
        budget=ladder.budget,
        forecast=climb.forecast,
        rungs=told,
        reserve=ladder.reserve(climb),
        speed=throughput.estimate(ladder, _overhead(told), device, compute_dtype, pace.steps, world),
        remedies=() if climb.fits else remedies(ladder, climb, forecaster_of),
        disk_bytes=_disk_bytes(recipe, ladder.standing),
        trained_parameters=ladder.standing.trained_parameters,
        cache_bytes=_cache_bytes(recipe, ladder.standing),
        choices=(
            Choice("device", device.label, device.why),
            Choice(
                "base", str(base.held_as(config, recipe.model) or "16 or 32 bits, not quantised"), "model.quantization"
            ),
            Choice("compute", compute_dtype, why_compute),
            Choice("adapter", _adapter(recipe, ladder.standing), _why_adapter(ladder.standing)),
            *_training_choices(recipe, pace, climb, accumulation),
        ),
    )


def _refuse_init(recipe: Recipe, held: Quantization | None) -> None:
    """Raises ModelError for an adapter that would begin by weights that the files do not have."""
    init = LORA_INITS[recipe.lora.init]
    if init.by_weights is not None and held is not None and held.is_given:
        raise ModelError(
            f'lora.init: "{init.name}" needs the weights that 4 bits were made from, and the files of'
            f" {recipe.model.base} have the 4 bits alone. Name the model that they were made from, or take another."
        )


@dataclass(frozen=True)
class Pace:
    """How many optimizer steps there are, what happens at which of them, and why."""

    steps: int
    warmup_steps: int
    eval_every: int
    steps_choice: Choice
    eval_choice: Choice


def _pace(recipe: Recipe, work: Work) -> Pace:
    steps, why_steps = _steps(recipe, len(work.sequences))
    if work.is_assumed:
        why_steps = "the data was not read: every sequence is taken to be full, their number is not known"
    eval_every, why_eval = _eval_every(recipe, steps)
    return Pace(
        steps,
        math.ceil(recipe.train.warmup_fraction * steps),
        eval_every,
        Choice("steps", "not known yet" if work.is_assumed else f"{steps:,}", why_steps),
        Choice("held-out loss", "every step" if eval_every == 1 else f"every {eval_every:,} steps", why_eval),
    )


def _training_choices(recipe: Recipe, pace: Pace, climb: Climb, accumulation: int) -> tuple[Choice, ...]:
    train, sequences = recipe.train, f"{recipe.train.micro_batch * recipe.train.gradient_accumulation}"
    warm_up = f"{_schedule(train)}, after {counted(pace.warmup_steps, 'step')} of warm-up"
    return (
        pace.steps_choice,
        Choice("sequences a step", sequences, _batch(recipe, climb.micro_batch, accumulation)),
        Choice("learning rate", _rate(train), warm_up),
        Choice("optimizer", train.optimizer, "train.optimizer"),
        Choice("packing", "yes" if recipe.data.packing else "no", "data.packing"),
        pace.eval_choice,
    )


def _rate(train: Train) -> str:
    of_b = f", of B {train.lora_plus_ratio * train.learning_rate:g}" if train.lora_plus_ratio != 1 else ""
    return f"{train.learning_rate:g}{of_b}"


def _schedule(train: Train) -> str:
    told = {"cosine_restarts": f" {train.cycles} times", "wsd": f" in the last {format_percent(train.decay_fraction)}"}
    floor = f" to {format_percent(train.floor_fraction)}" if train.floor_fraction else ""
    return f"{train.schedule}{told.get(train.schedule, '')}{floor}"


def longest_on(recipe: Recipe, devices: Sequence[Device], config: PreTrainedConfig) -> list[Longest]:
    """The longest sequence that fits on each of `devices`, which differ in nothing but their memory."""
    forecaster = _forecaster(recipe, devices[0], config, _compute_dtype(recipe, devices[0])[0])
    budgets = [budget_of(recipe, device) for device in devices]
    for budget in budgets:
        refuse_impossible(forecaster, BatchShape.of_one_document(STEP_TOKENS), budget.host_bytes)
    return [longest(forecaster, budget) for budget in budgets]


def _overhead(told: Sequence[Rung]) -> float:
    """What the techniques that are on add to a step, as a fraction of one with memory to spare."""
    return sum(rung.cost_fraction for rung in told if rung.is_on)


def _forecaster(recipe: Recipe, device: Device, config: PreTrainedConfig, compute_dtype: str) -> Forecaster:
    return activation_memory.forecaster(config, recipe, compute_dtype, device.capability, device.outside_bytes)


def budget_of(recipe: Recipe, device: Device, world: World = ALONE) -> Budget:
    """What the recipe allows, and no more than is free; else what is free, of the host's memory 80 %. What the host has
    is for all ranks on it, and each may take its part."""
    free = device.host_free_bytes // world.on_a_machine
    asked, asked_host = parse_bytes(recipe.memory.budget), parse_bytes(recipe.memory.host_budget)
    host = asked_host // world.on_a_machine if asked_host else round(HOST_FRACTION * free)
    return Budget(
        min(asked or device.free_bytes, device.free_bytes),
        min(host, free),
    )


def _disk_bytes(recipe: Recipe, standing: Standing) -> int:
    """What a run leaves: the adapter, and the checkpoints kept, of which one more is there while it is written. Where
    the adapter is an average, they have the weights that are trained, too."""
    adapter = 4 * standing.trained_parameters
    beside = adapter if OPTIMIZERS[recipe.train.optimizer].averages else 0
    checkpoints = recipe.save.keep + 2  # the newest, the best, and the one being written
    return adapter + checkpoints * (adapter + standing.optimizer_bytes + beside) + SPARE_DISK_BYTES


def _cache_bytes(recipe: Recipe, standing: Standing) -> int:
    """What the base in 4 bits takes in the cache, once for all runs on it; 0 where it is not kept."""
    head = 0 if standing.is_tied else standing.head_bytes
    held = standing.base_bytes + standing.embedding_bytes + head
    files = 2 * (standing.parameters + (standing.head_parameters if head else 0))  # of 16 bits
    return held if nf4_cache.keeps(recipe.model, files) and held <= cache_dir.largest_bytes() else 0


def _adapter(recipe: Recipe, standing: Standing) -> str:
    lora = recipe.lora
    scale = lora_variants.scale_of(lora_variants.of_recipe(lora), lora.alpha, lora.rank)
    share = standing.trained_parameters / standing.parameters
    trained = f"{format_count(standing.trained_parameters)} weights ({format_percent(share)})"
    others = f" (others: {', '.join(_patterns(lora))})" if lora.rank_pattern or lora.alpha_pattern else ""
    begun = "" if lora.init == DEFAULT else f", begun by {lora.init}"
    rows = f", rows of {counted(len(lora.train_tokens), 'token')}" if lora.train_tokens else ""
    kind = f"{lora_variants.plan_title(lora)}, rank {lora.rank}, scale {scale:.3g}{others}{begun}{rows}"
    return f"{kind}, {trained} in {lora.master_dtype}"


def _patterns(lora: Lora) -> list[str]:
    return [
        *(f"rank {rank} in {name}" for name, rank in lora.rank_pattern.items()),
        *(f"alpha {alpha:g} in {name}" for name, alpha in lora.alpha_pattern.items()),
    ]


def _why_adapter(standing: Standing) -> str:
    without = "; ".join(f"{name} has none, as {why}" for name, why in standing.left_out.items())
    return f"lora; {without}" if without else "lora"


def _batch(recipe: Recipe, micro_batch: int, accumulation: int) -> str:
    asked = recipe.train.micro_batch
    told = (
        f"micro_batch {micro_batch} x gradient_accumulation {accumulation},"
        f" each of at most {recipe.data.max_tokens:,} tokens"
    )
    return told if micro_batch == asked else f"{told}; micro_batch {asked} does not fit"


def _compute_dtype(recipe: Recipe, device: Device) -> tuple[str, str]:
    asked = recipe.model.compute_dtype
    if asked != "auto":
        return asked, "model.compute_dtype"
    if device.compute_dtype == "bfloat16":
        return "bfloat16", f"{device.label} multiplies bfloat16 itself"
    return device.compute_dtype, f"{device.label} has no bfloat16 arithmetic"


def _steps(recipe: Recipe, train_packs: int) -> tuple[int, str]:
    """Optimizer steps; the last step of an epoch takes what sequences are left."""
    train = recipe.train
    per_epoch = math.ceil(math.ceil(train_packs / train.micro_batch) / train.gradient_accumulation)
    steps = math.ceil(train.epochs * per_epoch)
    if train.max_steps is not None and train.max_steps < steps:
        return train.max_steps, "train.max_steps"
    return (
        steps,
        f"{counted(train.epochs, 'epoch')} of {counted(per_epoch, 'step')} over {counted(train_packs, 'sequence')}",
    )


def _eval_every(recipe: Recipe, steps: int) -> tuple[int, str]:
    if recipe.train.eval_every is not None:
        return recipe.train.eval_every, "train.eval_every"
    return max(1, math.ceil(steps / EVALUATIONS)), f"{EVALUATIONS} times in the run"
