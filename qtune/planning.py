"""A plan without a run: for this machine or for a card that is not here, and the longest context that fits."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qtune.data.prepare import prepare
from qtune.errors import UserError
from qtune.hardware import Device
from qtune.model import base
from qtune.model.tokenizer import has_tokenizer_here, load_tokenizer, trained_ids
from qtune.plan.max_context import STEP_TOKENS, Longest
from qtune.plan.plan import Plan
from qtune.plan.planner import decide, longest_on
from qtune.plan.suggestions import refuse_unless_it_fits
from qtune.plan.throughput import GRADIENT_BYTES
from qtune.plan.workload import Work
from qtune.plan.world import ALONE, World
from qtune.ready import finding_base, started, work_of
from qtune.recipe.data_files import files_of
from qtune.recipe.schema import Recipe
from qtune.report.progress_line import Doing
from qtune.train.sampler import dealt
from qtune.units import counted


def plan_without_downloads(recipe: Recipe, device: Device, doing: Doing) -> Plan:
    """The plan from config.json alone; rows are read where data and tokenizer are on this machine already.

    Raises a UserError for anything that could not be trained on.
    """
    return plans_of_cards(recipe, [device], ALONE, doing)[0]


def plans_of_cards(recipe: Recipe, devices: Sequence[Device], world: World, doing: Doing) -> list[Plan]:
    """The plan of each of `devices`, which are the ranks of one `world`: what it holds, and how fast it would be if all
    were like it. Raises as `plan_without_downloads` does."""
    base.quiet_libraries()
    with finding_base(recipe, doing):
        config = base.read_config_alone(recipe.model)
    recipe = started(config, recipe, doing)
    names = [*(part.train for part in recipe.data.parts.values()), recipe.data.held_out]
    is_here = has_tokenizer_here(recipe.model) and all(
        Path(name).is_absolute() and files_of(Path(name)) for name in names if name
    )
    if is_here:
        doing(f"reading {recipe.data.title}")
        tokenizer = load_tokenizer(recipe.model)
        trained_ids(tokenizer, recipe.lora.train_tokens)
        work = work_of(prepare(recipe, tokenizer, doing.rows), recipe.train)
    else:
        work = Work.of_full_sequences(recipe.data.max_tokens)
    doing("planning")
    kinds = dict.fromkeys(devices)
    plans = {kind: decide(recipe, kind, config, work, weighs_all=True, world=world) for kind in kinds}
    return [plans[device] for device in devices]


def together(recipe: Recipe, plans: Sequence[Plan], world: World) -> dict[str, Any]:
    """What the ranks of one `world`, whose `plans` are these, do together, as JSON: a step's packs dealt by speed, and
    how long it takes; None where a card's speed is not known."""
    _refuse_unlike_arithmetic(plans)
    packs = recipe.train.micro_batch * recipe.train.gradient_accumulation
    seconds = [plan.speed.pack_seconds for plan in plans]
    known = [each for each in seconds if each is not None]
    is_known = len(known) == len(plans)
    shares = [1 / each for each in known] if is_known else [1.0] * len(plans)
    counts = [len(rows) for rows in dealt(range(packs), lambda row: 1, shares)]
    summing = world.sum_seconds(GRADIENT_BYTES * plans[0].trained_parameters)
    step = max(count * each for count, each in zip(counts, known, strict=True)) + summing if is_known else None
    return {
        "link": asdict(world.link),
        "packs": packs,
        "steps": plans[0].steps,
        "is_assumed": plans[0].is_assumed,
        "sum_seconds": summing,
        "step_seconds": step,
        "total_seconds": None if step is None else step * plans[0].steps,
        "cards": [{"packs": count, "plan": plan.as_json()} for count, plan in zip(counts, plans, strict=True)],
    }


def _refuse_unlike_arithmetic(plans: Sequence[Plan]) -> None:
    """Raises UserError for cards of which a run would refuse one for another's arithmetic."""
    by_dtype = {plan.compute_dtype: plan.device.label for plan in plans}
    if len(by_dtype) > 1:
        each = " and ".join(f"{label} in {dtype}" for dtype, label in by_dtype.items())
        raise UserError(
            f"--cards: these compute differently, {each}, and would not train one adapter. Set"
            ' model.compute_dtype = "float16", which all of them have.'
        )


def longest_contexts(recipe: Recipe, devices: Sequence[Device], doing: Doing) -> list[tuple[Device, Longest]]:
    """The longest sequence that fits on each device, by whichever plan takes it furthest, and what bounds it."""
    base.quiet_libraries()
    with finding_base(recipe, doing):
        config = base.read_config_alone(recipe.model)
    recipe = started(config, recipe, doing)
    doing(f"planning for {counted(len(devices), 'card')}")
    return list(zip(devices, longest_on(recipe, devices, config), strict=True))


def refuse_where_none_fits(recipe: Recipe, device: Device) -> None:
    """Raises DoesNotFit, with the changes that would, where `device` has no room for the shortest sequence."""
    shortest = recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_tokens": STEP_TOKENS})})
    config = base.read_config_alone(recipe.model)
    refuse_unless_it_fits(shortest, decide(shortest, device, config, Work.of_full_sequences(STEP_TOKENS)))
