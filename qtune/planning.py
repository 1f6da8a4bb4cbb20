"""A plan without a run: for this machine or for a card that is not here, and the longest context that fits."""

from collections.abc import Sequence
from pathlib import Path

from qtune.data.prepare import prepare
from qtune.hardware import Device
from qtune.model import base
from qtune.model.tokenizer import has_tokenizer_here, load_tokenizer
from qtune.plan.max_context import STEP_TOKENS, Longest
from qtune.plan.plan import Plan
from qtune.plan.planner import decide, longest_on
from qtune.plan.suggestions import refuse_unless_it_fits
from qtune.plan.workload import Work
from qtune.ready import finding_base, work_of
from qtune.recipe.schema import Recipe
from qtune.report.progress_line import Doing
from qtune.units import counted


def plan_without_downloads(recipe: Recipe, device: Device, doing: Doing) -> Plan:
    """The plan from config.json alone; rows are read where data and tokenizer are on this machine already.

    Raises a UserError for anything that could not be trained on.
    """
    base.quiet_libraries()
    with finding_base(recipe, doing):
        config = base.read_config_alone(recipe.model)
    sources = [recipe.data.train, *([recipe.data.held_out] if recipe.data.held_out else [])]
    is_here = has_tokenizer_here(recipe.model) and all(Path(source).is_file() for source in sources)
    if not is_here:
        doing("planning")
        return decide(recipe, device, config, Work.of_full_sequences(recipe.data.max_tokens), weighs_all=True)
    doing(f"reading {recipe.data.train}")
    prepared = prepare(recipe, load_tokenizer(recipe.model), doing.rows)
    doing("planning")
    return decide(recipe, device, config, work_of(prepared), weighs_all=True)


def longest_contexts(recipe: Recipe, devices: Sequence[Device], doing: Doing) -> list[tuple[Device, Longest]]:
    """The longest sequence that fits on each device, by whichever plan takes it furthest, and what bounds it."""
    base.quiet_libraries()
    with finding_base(recipe, doing):
        config = base.read_config_alone(recipe.model)
    doing(f"planning for {counted(len(devices), 'card')}")
    return list(zip(devices, longest_on(recipe, devices, config), strict=True))


def refuse_where_none_fits(recipe: Recipe, device: Device) -> None:
    """Raises DoesNotFit, with the changes that would, where `device` has no room for the shortest sequence."""
    shortest = recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_tokens": STEP_TOKENS})})
    config = base.read_config_alone(recipe.model)
    refuse_unless_it_fits(shortest, decide(shortest, device, config, Work.of_full_sequences(STEP_TOKENS)))
