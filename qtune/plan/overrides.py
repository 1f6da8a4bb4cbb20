"""What a recipe's [memory] settles itself: as techniques, and refused where the model or the host does not allow it."""

from qtune.errors import MachineError, ModelError
from qtune.memory.techniques import Head, Techniques
from qtune.plan.fake_step import Batch
from qtune.plan.forecast import Forecaster
from qtune.recipe.schema import Recipe
from qtune.units import format_bytes

FIELDS = {  # settings of [memory] that switch a technique on, and the fields of Techniques
    "keep_layers": "recomputed_layers",
    "checkpoints": "host_checkpoints",
    "tile_tokens": "tile_tokens",
    "embedding": "host_embedding",
    "head": "head",
    "stream_layers": "streamed_layers",
    "head_groups": "head_groups",
}
OFF = {"stream_layers": (0,), "tile_tokens": (0,), "head_groups": (1,), "checkpoints": ("device",)}
OFF |= {"embedding": ("device",), "head": ("16bit",)}
HEAD_BY_SETTING: dict[str, Head] = {"auto": "device", "16bit": "device", "host": "host", "nf4": "nf4"}


def forced(recipe: Recipe, forecaster: Forecaster) -> Techniques:
    """What the recipe settles itself; what it leaves open is off."""
    memory, layers = recipe.memory, forecaster.layers
    recomputed = 0 if memory.keep_layers == "auto" else max(0, layers - memory.keep_layers)
    streamed = 0 if memory.stream_layers == "auto" else min(memory.stream_layers, layers)
    return Techniques(
        recomputed_layers=layers if streamed else recomputed,
        host_checkpoints=memory.checkpoints == "host",
        tile_tokens=0 if memory.tile_tokens == "auto" else memory.tile_tokens,
        host_embedding=memory.embedding == "host",
        head=HEAD_BY_SETTING[memory.head],
        streamed_layers=streamed,
        head_groups=1 if memory.head_groups == "auto" else memory.head_groups,
    )


def refusals(recipe: Recipe, forecaster: Forecaster) -> dict[str, str]:
    """Why a rung cannot be climbed, by field of Techniques: the model's reasons, and those of the recipe."""
    found = dict(forecaster.standing.refusals)
    kept = recipe.memory.keep_layers
    if kept != "auto" and kept > 0:
        found.setdefault("streamed_layers", f"a streamed layer is recomputed, and memory.keep_layers = {kept}")
    return found


def refuse_impossible(recipe: Recipe, forecaster: Forecaster, smallest: Batch, host_bytes: int) -> None:
    """Raises ModelError for techniques that are asked for and the model does not allow, MachineError where they would
    put more than `host_bytes` into host memory even with `smallest`, the smallest batch that is rehearsed."""
    on = [key for key in FIELDS if getattr(recipe.memory, key) not in ("auto", *OFF.get(key, ()))]
    refused = forecaster.standing.refusals
    wrong = [f"{written(recipe, key)} cannot be done: {refused[FIELDS[key]]}" for key in on if FIELDS[key] in refused]
    groups, heads = recipe.memory.head_groups, key_value_heads(forecaster)
    if groups != "auto" and heads % groups and "head_groups" not in refused:
        fitting = ", ".join(str(n) for n in range(2, heads + 1) if heads % n == 0)
        wrong.append(f"{written(recipe, 'head_groups')} does not divide the {heads} key/value heads; {fitting} would")
    if wrong:
        raise ModelError("\n".join(f"{sentence} (model.base is {recipe.model.base})." for sentence in wrong))
    parts = forecaster.host_parts(forced(recipe, forecaster), smallest)
    needed = sum(parts.values())
    asked = [key for key in ("stream_layers", "checkpoints", "embedding", "head") if key in on]
    if asked and needed > host_bytes:
        raise MachineError(
            f"{' and '.join(written(recipe, key) for key in asked)} would keep {format_bytes(needed)} in host memory,"
            f" and {format_bytes(host_bytes)} may be taken there (memory.host_budget, else 80 % of what is free). Ask"
            " for less, or leave it to the plan."
        )


def key_value_heads(forecaster: Forecaster) -> int:
    return getattr(forecaster.config.get_text_config(), "num_key_value_heads", None) or 1


def written(recipe: Recipe, key: str) -> str:
    """`memory.checkpoints = "host"`."""
    value = getattr(recipe.memory, key)
    return f"memory.{key} = " + (f'"{value}"' if isinstance(value, str) else str(value))
