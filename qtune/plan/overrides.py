"""What a recipe's [memory] settles itself: as techniques, and refused where the model or the host does not allow it."""

from qtune.errors import MachineError, ModelError
from qtune.memory.techniques import TECHNIQUES, Technique, Techniques
from qtune.memory.techniques.standing import Standing
from qtune.plan.forecast import Forecaster
from qtune.plan.workload import BatchShape
from qtune.recipe.schema import HOST_FRACTION, Memory, Recipe
from qtune.units import format_bytes


def settled(memory: Memory) -> list[Technique]:
    """The techniques that the recipe does not leave to the plan."""
    return [each for each in TECHNIQUES.values() if getattr(memory, each.key) != "auto"]


def forced(memory: Memory, standing: Standing) -> Techniques:
    """What the recipe settles itself; what it leaves open is off."""
    techniques = Techniques()
    for each in settled(memory):
        techniques = each.settled(techniques, getattr(memory, each.key), standing)
    return techniques


def refusals(memory: Memory, standing: Standing) -> dict[str, str]:
    """Why a rung cannot be climbed, by technique: the model's reasons, and those of the recipe."""
    ruled_out = {name: why for name, each in TECHNIQUES.items() if (why := each.ruled_out(memory))}
    return ruled_out | standing.refusals


def refuse_impossible(forecaster: Forecaster, smallest: BatchShape, host_bytes: int) -> None:
    """Raises ModelError for techniques that are asked for and the model does not allow, MachineError where they would
    put more than `host_bytes` into host memory even with `smallest`, the smallest batch that is rehearsed."""
    recipe, standing = forecaster.recipe, forecaster.standing
    asked = [each for each in settled(recipe.memory) if each.is_asked_for(getattr(recipe.memory, each.key))]
    wrong = [
        f"{written(recipe, each)} cannot be done: {standing.refusals[each.name]}"
        for each in asked
        if each.name in standing.refusals
    ]
    for each in settled(recipe.memory):
        fault = each.fault(getattr(recipe.memory, each.key), standing)
        if fault is not None and each.name not in standing.refusals:
            wrong.append(f"{written(recipe, each)} {fault}")
    if wrong:
        raise ModelError("\n".join(f"{sentence} (model.base is {recipe.model.base})." for sentence in wrong))
    needed = sum(forecaster.host_parts(forced(recipe.memory, standing), smallest).values())
    on_host = [each for each in asked if any(step.is_for_host for step in each.steps)]
    on_host.sort(key=lambda each: not each.fills_host)  # first what has an amount: less of it can be had
    if on_host and needed > host_bytes:
        raise MachineError(
            f"{' and '.join(written(recipe, each) for each in on_host)} would keep {format_bytes(needed)} in host"
            f" memory, and {format_bytes(host_bytes)} may be taken there (memory.host_budget, else"
            f" {100 * HOST_FRACTION:.0f} % of what is free). Ask for less, or leave it to the plan."
        )


def written(recipe: Recipe, technique: Technique) -> str:
    """`memory.checkpoints = "host"`."""
    value = getattr(recipe.memory, technique.key)
    return f"memory.{technique.key} = " + (f'"{value}"' if isinstance(value, str) else str(value))
