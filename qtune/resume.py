"""A run that was stopped goes on: from which checkpoint, and only on what it stood on before."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from qtune.distributed.agreement import names_rows, shown
from qtune.errors import RecipeError, RunFolderError
from qtune.lock import Lock
from qtune.recipe import load
from qtune.recipe.schema import Recipe
from qtune.rundir import RunDir, leaves, write_json

# What may change between two halves of a run if the user says so; a name that ends in a dot stands for all under it.
CHANGEABLE = (
    "name",
    "about",
    "demo.",
    "evaluate.",
    "memory.",
    "report.",
    "save.",
    "train.epochs",
    "train.max_steps",
    "train.learning_rate",
    "train.lora_plus_ratio",
    "train.schedule",
    "train.floor_fraction",
    "train.decay_fraction",
    "train.cycles",
    "train.warmup_fraction",
    "train.weight_decay",
    "train.max_grad_norm",
    "train.eval_every",
    "train.log_every",
    "train.patience",
    "lora.start_from",  # another place for the same adapter, whose hash is held against it
    "model.base",  # another place for the same weights, whose hash is held against them
    "data.check.",
    "device",
    "versions.",
)
FIXED = {  # of those above, with the reason
    "evaluate.canaries": "canaries are rows that are trained on",
    "evaluate.canary_repeats": "canaries are rows that are trained on",
}
# Said by the recipe's own fields or by base.sha256, or no matter.
IGNORED = (
    "base.folder",
    "base.name",
    "base.glance_sha256",
    "base.has_towers",
    "start.name",
    "packing_probe.",
    "model.",
    "seed",
    "name",
)


@dataclass(frozen=True)
class Invocation:
    """How a run was asked for: `recipe_folder` is where the names in its recipe start, `overrides` are its --set."""

    recipe_folder: str
    overrides: tuple[str, ...]
    demo: bool

    @classmethod
    def of_run(cls, run: RunDir) -> "Invocation":
        """Raises RunFolderError for one that qtune did not write."""

        def said(values: Any) -> Invocation:
            return cls(values["recipe_folder"], tuple(values["overrides"]), values["demo"])

        return run.read_as(run.invocation, said)


@dataclass(frozen=True)
class Change:
    """A field that is not what it was when the run began."""

    field: str
    before: Any
    now: Any

    @property
    def may_be_allowed(self) -> bool:
        is_named = any(self.field == name or (name[-1] == "." and self.field.startswith(name)) for name in CHANGEABLE)
        return (is_named or names_rows(self.field)) and self.field not in FIXED

    def sentence(self) -> str:
        told = f"{self.field}: was {shown(self.before)}, is {shown(self.now)}"
        if self.may_be_allowed:
            return f"{told} (--allow-change {self.field})"
        return f"{told}; {FIXED[self.field]}" if self.field in FIXED else told


def refuse_without_checkpoints(run: RunDir) -> None:
    """Raises RunFolderError for a run whose checkpoints were removed: it would begin again, over the adapter it has."""
    if run.checkpoints_removed.is_file():
        raise RunFolderError(
            f"{run.path}: its checkpoints were removed, so it cannot go on. `qtune run` begins a new run."
        )


def recipe_of(run: RunDir, overrides: Sequence[str]) -> Recipe:
    """The run's recipe as its folder has it now, with the overrides of then and, on top, those given now.

    Raises RecipeError for one that does not hold any more.
    """
    began = Invocation.of_run(run)
    _refuse_moved_base(run, overrides)
    try:
        return load.load(run.recipe, [*began.overrides, *overrides], began.demo, Path(began.recipe_folder))
    except RecipeError as fault:
        is_moved = any("model.base: there is no folder" in sentence for sentence in fault.faults)
        raise RecipeError([*fault.faults, *([_where_it_is_now(run)] if is_moved else [])]) from None


def _refuse_moved_base(run: RunDir, overrides: Sequence[str]) -> None:
    """Raises RunFolderError where the base's folder is gone; its name in the recipe could be one on the hub, too."""
    if not run.lock.is_file() or any(each.startswith("model.base=") for each in overrides):
        return
    base = Path(run.read_lock().base_name)
    if base.is_absolute() and not base.exists():
        raise RunFolderError(f"{run.path}: its base is not in {base} any more. {_where_it_is_now(run)}")


def _where_it_is_now(run: RunDir) -> str:
    command = f"qtune resume {shlex.quote(str(run.path))} --set model.base=FOLDER --allow-change model.base"
    return f"If the base was moved, say where it is now, and its weights are held against those of the run: {command}"


def recipe_then(run: RunDir) -> Recipe:
    """The recipe that the run began with, settled. A setting that came later has its default, which is what a version
    without it did. Raises RunFolderError for settings of another version that this one does not know."""
    return run.of_lock(lambda lock: Recipe(**lock.recipe))


def remember(run: RunDir, overrides: Sequence[str]) -> None:
    """Keep the overrides that a run goes on with, for the next time it is resumed."""
    began = Invocation.of_run(run)
    overrides = (*began.overrides, *load.given_anywhere(overrides))
    write_json(run.invocation, asdict(replace(began, overrides=overrides)))


def changes(before: Lock, now: Lock) -> list[Change]:
    """What differs between two locks, by field; a recipe's fields go by the names they have in it."""
    old, new = _flat(before.as_json()), _flat(now.as_json())
    found = [Change(field, old.get(field), new.get(field)) for field in dict.fromkeys([*old, *new])]
    return [change for change in found if change.before != change.now and not _is_the_same_run(change)]


def _is_the_same_run(change: Change) -> bool:
    """Whether what differs is only where something lies: on which of several cards, or the optimizer's state in paged
    memory, of which a checkpoint holds the same."""
    before, now = str(change.before), str(change.now)
    if change.field == "device":
        return before.partition(":")[0] == now.partition(":")[0]
    return change.field == "train.optimizer" and before.removeprefix("paged_") == now.removeprefix("paged_")


def refuse_changes(run: RunDir, found: Sequence[Change], allowed: Sequence[str]) -> None:
    """Raises RunFolderError for changes that were not allowed, each with its old and its new value."""
    names = {change.field for change in found}
    idle = [field for field in allowed if field not in names]
    if idle:
        near = get_close_matches(idle[0], names, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise RunFolderError(f"--allow-change {idle[0]}: that has not changed.{hint}")
    refused = [change for change in found if change.field not in allowed or not change.may_be_allowed]
    if not refused:
        return
    lines = [f"{run.path}: is not what it was when the run began, so it would not be the same run."]
    lines += [f"  {change.sentence()}" for change in refused]
    if all(change.may_be_allowed for change in refused):
        lines.append("Put it back, or allow the change as it says in brackets.")
    else:
        lines.append(
            "Put it back, or begin a new run with `qtune run`: a run cannot go on with what has no --allow-change."
        )
    raise RunFolderError("\n".join(lines))


def _flat(lock: Mapping[str, Any]) -> dict[str, Any]:
    flat = dict(leaves({key: value for key, value in lock.items() if key != "recipe"}))
    flat = {field: value for field, value in flat.items() if not field.startswith(IGNORED)}
    return {**dict(leaves(lock["recipe"])), **flat}
