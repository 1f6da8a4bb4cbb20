"""A run before it begins: every claim of its recipe checked, its rows tokenised, its plan settled, its folder made.

Nothing is loaded here; what cannot be is refused.
"""

import contextlib
import dataclasses
import importlib.metadata
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from qtune import __version__, logs
from qtune.data.packing import packed_rows
from qtune.data.prepared import Prepared
from qtune.data.tokenize import tokenizer_sha256
from qtune.distributed import agreement
from qtune.distributed.ranks import ALONE, Ranks
from qtune.errors import DataError, MachineError, ModelError, RunFolderError
from qtune.evaluate.held_out import HeldOut, read_rows
from qtune.events import Resumed
from qtune.hardware import find_device
from qtune.lock import Lock, LockedBase
from qtune.memory.techniques import TECHNIQUES
from qtune.model import base, fingerprint
from qtune.model.lora_inits import LORA_INITS
from qtune.model.start_adapter import StartAdapter
from qtune.model.tokenizer import trained_ids
from qtune.plan import fake_model
from qtune.plan.fake_model import refuse_unknown_targets
from qtune.plan.plan import Plan, Settled
from qtune.plan.planner import decide
from qtune.plan.suggestions import refuse_unless_it_fits
from qtune.plan.workload import Work
from qtune.plan.world import World
from qtune.recipe.schema import Recipe, Train
from qtune.recipe.text_part import TextPart
from qtune.report.progress_line import Doing
from qtune.resume import Invocation, changes, recipe_then, refuse_changes
from qtune.rundir import RunDir, default_path, leaves, read_json, write_json
from qtune.train import checkpoint_files
from qtune.train.checkpoint_files import Checkpoint
from qtune.train.lr_schedule import rate_of
from qtune.train.objectives import OBJECTIVES
from qtune.units import format_bytes

MOVING = tuple(name for name, each in TECHNIQUES.items() if each.moves_layers)
LOCKED_PACKAGES = ("torch", "bitsandbytes", "peft", "transformers", "trl", "datasets", "accelerate")
PROBE_ROWS = 64


@dataclass(frozen=True)
class Ready:
    """A recipe whose every claim has been checked: rows tokenised, choices settled, nothing loaded yet."""

    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    prepared: Prepared
    plan: Plan
    held_out: HeldOut

    @property
    def title(self) -> str:
        """`medical   Qwen/Qwen3-4B-Instruct   LoRA rank 16`."""
        return f"{self.recipe.name}   {self.recipe.model.base}   LoRA rank {self.recipe.lora.rank}"

    def lock(self, quantized: Sequence[str]) -> Lock:
        """What this run stands on, by hash and version; merging and a later resume hold it against what they find.

        `quantized` are the modules of the base that are held in 4 bits.
        """
        recipe, model = self.recipe, self.recipe.model
        folder = base.base_folder(model)
        return Lock(
            name=recipe.name,
            base=LockedBase(
                name=model.base,
                folder=str(folder),
                sha256=fingerprint.fingerprint(folder),
                glance_sha256=fingerprint.glance(folder),
                has_towers=TextPart.in_folder(folder).is_within,
            ),
            model=model.model_dump(mode="json"),
            recipe=recipe.model_dump(mode="json"),
            quantized_modules=tuple(quantized),
            quantization=base.held_as(base.config_in(folder, model), model) if quantized else None,
            device=self.plan.device.name,
            compute_dtype=self.plan.compute_dtype,
            data_sha256=self.prepared.fingerprint,
            template_sha256=self.prepared.template_fingerprint,
            tokenizer_sha256=tokenizer_sha256(self.tokenizer),
            stop_token_ids=tuple(self.prepared.stop_token_ids),
            seed=recipe.train.seed,
            versions=versions(),
            start=start.locked() if (start := StartAdapter.of(recipe.lora)) else None,
        )


@dataclass(frozen=True)
class GoingOn:
    """From which checkpoint a run that was stopped goes on, None for the beginning; `told` says why from that one."""

    checkpoint: Checkpoint | None
    told: Resumed


def versions() -> dict[str, str]:
    """Of qtune and of what its runs depend on, by name."""
    return {"qtune": __version__, **{name: importlib.metadata.version(name) for name in LOCKED_PACKAGES}}


def refuse_unlike_recipes(ranks: Ranks, recipe: Recipe) -> None:
    """Before anything is read for it. Raises MachineError where ranks have another recipe or other versions."""
    agreement.refuse_unlike(ranks, dict(leaves({**recipe.model_dump(mode="json"), "versions": versions()})))


def refuse_unlike_ranks(ranks: Ranks, ready: Ready) -> None:
    """Raises MachineError where ranks have other rows, another base, at a glance, or a device with other arithmetic."""
    model = ready.recipe.model
    told = {
        "data": ready.prepared.fingerprint,
        "base": model.base if is_on_hub(ready.recipe) else fingerprint.glance(base.base_folder(model)),
        "tokenizer": tokenizer_sha256(ready.tokenizer),
        "template": ready.prepared.template_fingerprint,
        "device": ready.plan.device.name.partition(":")[0],
        "arithmetic": ready.plan.compute_dtype,
        "start": start.locked().sha256 if (start := StartAdapter.of(ready.recipe.lora)) else None,
    }
    agreement.refuse_unlike(ranks, told)


def get_ready(
    recipe: Recipe, settled: Settled | None = None, doing: Doing | None = None, ranks: Ranks = ALONE
) -> Ready:
    """Read the data, settle the plan of this one of the `ranks`, alone; `doing` hears how far that is.

    Raises a UserError for anything that could not be trained on, or not be scored afterwards.
    """
    base.quiet_libraries()
    doing = doing or Doing()
    with finding_base(recipe, doing):
        config = base.read_config_alone(recipe.model)
    recipe = started(config, recipe, doing)
    refuse_unknown_targets(config, recipe)
    doing(f"reading {recipe.data.title}")
    read = read_rows(recipe, doing.rows)
    trained_ids(read.tokenizer, recipe.lora.train_tokens)
    if not read.held_out.packs:
        _refuse_what_needs_held_out_rows(recipe)
    doing("planning")
    plan = decide(recipe, find_device(), config, work_of(read.prepared, recipe.train), settled, world=_world_of(ranks))
    return Ready(recipe, read.tokenizer, read.prepared, plan, read.held_out)


def _refuse_what_needs_held_out_rows(recipe: Recipe) -> None:
    """Raises DataError for settings that go by the held-out loss."""
    wants = {
        'save.result: is "best"': recipe.save.result == "best",
        f"train.patience: is {recipe.train.patience}": recipe.train.patience is not None,
    }
    asked = [setting for setting, is_on in wants.items() if is_on]
    if asked:
        instead = "Name a file in data.held_out, or raise data.held_out_fraction."
        raise DataError(
            "\n".join(f"{each}, and no row is held out to tell which step is best. {instead}" for each in asked)
        )


def _world_of(ranks: Ranks) -> World:
    return World(ranks.size, ranks.hosts.count(ranks.hosts[ranks.rank]))


def agree_on_layers(ranks: Ranks, ready: Ready) -> Ready:
    """`ready`, with a plan in which as many layers are elsewhere as in those of all `ranks`, where any has layers in
    parts: a part is handed out by every rank, or it is waited for.

    Raises ModelError for an adapter that would begin by weights of which no rank has all.
    """
    ours = [getattr(ready.plan.techniques, name) for name in MOVING]
    of_all = ranks.gather(ours)
    most = [max(counts) for counts in zip(*of_all, strict=True)]
    is_in_parts = most[MOVING.index("sharded_layers")] > 0
    if is_in_parts and LORA_INITS[ready.recipe.lora.init].by_weights is not None:
        raise ModelError(
            f'lora.init = "{ready.recipe.lora.init}" reads every weight of the base, and of layers in parts'
            " (memory.shard_layers) no rank has all. Take another."
        )
    if not is_in_parts or all(each == most for each in of_all):
        return ready
    asked = {TECHNIQUES[name].key: count for name, count in zip(MOVING, most, strict=True)}
    memory = ready.recipe.memory.model_copy(update={"keep_layers": "auto", **asked})
    recipe, config = ready.recipe.model_copy(update={"memory": memory}), base.read_config_alone(ready.recipe.model)
    plan = decide(recipe, find_device(), config, work_of(ready.prepared, recipe.train), world=_world_of(ranks))
    return dataclasses.replace(ready, plan=plan)


def finding_base(recipe: Recipe, doing: Doing) -> contextlib.AbstractContextManager[None]:
    """While the base's files are looked for, which the hub draws bars of if it is asked."""
    name = recipe.model.base
    if is_on_hub(recipe):
        return doing.aside(f"asking the hub for {name}")
    doing(f"reading {name}")
    return contextlib.nullcontext()


def started(config: PreTrainedConfig, recipe: Recipe, doing: Doing) -> Recipe:
    """`recipe` with what the adapter that it starts from settles, which is held against the base by names and shapes.

    Raises ModelError where they contradict, and what `StartAdapter.of` raises.
    """
    name = recipe.lora.start_from
    if name is None:
        return recipe
    with doing.aside(f"asking the hub for {name}") if not Path(name).is_absolute() else contextlib.nullcontext():
        doing(f"reading {name}")
        start = StartAdapter.of(recipe.lora)
    assert start is not None, "it has a name"
    base_alone = fake_model.empty(config, recipe)
    recipe = start.taken_over(recipe, base_alone)
    start.refuse_unfit(fake_model.attached(base_alone, recipe), recipe.model.base)
    return recipe


def is_on_hub(recipe: Recipe) -> bool:
    return recipe.model.base != "demo" and not Path(recipe.model.base).is_absolute()


def work_of(prepared: Prepared, learned: Train) -> Work:
    """`prepared` rows as they take memory and time where that is `learned`."""
    train, packs = prepared.train, prepared.train_packs
    predicted = train.trained_tokens
    if OBJECTIVES[learned.objective].reads_whole:
        predicted = predicted + train.prompt_tokens - 1  # and what a template writes behind an answer: a token or two
    return Work.of_packs(packed_rows(train, packs).seq_lengths, packs, predicted)


def start_folder(
    ready: Ready, recipe_text: str, invocation: Invocation, output: Path | None, ranks: Ranks = ALONE
) -> RunDir:
    """A new run folder that says what was asked for and what was settled, before anything can fail; of further ranks
    one in the folder of the first.

    Raises MachineError where the run does not fit in memory, or what it leaves not on the disk, and RunFolderError
    where not all ranks see it.
    """
    path = Path(ranks.broadcast(str(output or default_path(ready.recipe.name, datetime.now()))))
    refuse_unless_it_fits(ready.recipe, ready.plan)
    asked = dataclasses.asdict(invocation)
    if ranks.is_first:
        refuse_full_disk(path, ready.plan.disk_bytes)
        RunDir.create(path, recipe_text, asked)
    try:
        agreement.refuse_unshared(ranks, path)
    except RunFolderError:
        if ranks.is_first:
            shutil.rmtree(path)
        raise
    run = RunDir(path) if ranks.is_first else RunDir.create(RunDir(path).of_rank(ranks.rank).path, recipe_text, asked)
    logs.write_to(run.log)
    _describe(ready, run)
    return run


def folder_again(ready: Ready, run: RunDir, ranks: Ranks = ALONE) -> RunDir:
    """The folder in which this rank of a run goes on: the first in the run's own, each other in a new one.

    Raises RunFolderError where not all ranks see it.
    """
    agreement.refuse_unshared(ranks, run.path)
    if ranks.is_first:
        shutil.rmtree(run.ranks, ignore_errors=True)
    ranks.gather("those of before are gone")
    folder = run.of_rank(ranks.rank)
    if not ranks.is_first:
        RunDir.create(folder.path, run.recipe.read_text(encoding="utf-8"), read_json(run.invocation))
        for file in (run.lock, run.base_score):
            if file.is_file():
                shutil.copy(file, folder.path)
    logs.write_to(folder.log)
    _describe(ready, folder)
    return folder


def _describe(ready: Ready, run: RunDir) -> None:
    write_json(run.plan, ready.plan.as_json())
    write_json(run.data, dataclasses.asdict(ready.prepared.report))
    write_json(run.probe, [example.input_ids for example in ready.prepared.held_out[:PROBE_ROWS]])


def get_ready_again(
    run: RunDir, recipe: Recipe, allowed: Sequence[str], doing: Doing, ranks: Ranks = ALONE
) -> tuple[Ready, GoingOn]:
    """What a run that was stopped needs to go on.

    Raises RunFolderError where it no longer is what it was and that was not `allowed`, field by field, and where all
    its checkpoints are broken.
    """
    doing("looking for the newest whole checkpoint")
    path, why = checkpoint_files.choose(run.checkpoints)
    agreement.refuse_unlike(ranks, {"checkpoint": path and path.name})
    checkpoint = None if path is None else Checkpoint.read(path)
    is_replanned = any(field.startswith("memory.") for field in allowed)
    settled = None if checkpoint is None or is_replanned else Settled(checkpoint.techniques, checkpoint.micro_batch)
    with ranks.one_before_others("rows"):
        ready = get_ready(recipe, settled, doing, ranks)
    refuse_unlike_ranks(ranks, ready)
    ready = agree_on_layers(ranks, ready)
    refuse_unless_it_fits(ready.recipe, ready.plan)
    if run.lock.is_file():
        doing(f"hashing {recipe.model.base}")
        before = dataclasses.replace(run.read_lock(), recipe=recipe_then(run).model_dump(mode="json"))
        now = ready.lock(before.quantized_modules)
        refuse_changes(run, changes(before, now), allowed)
        refuse_full_disk(run.path, ready.plan.disk_bytes)
        ranks.gather("all have read the lock")
        if ranks.is_first:
            run.write_lock(now)
    if checkpoint is not None and checkpoint.warms_otherwise(ready.plan.warmup_steps):
        why += " Its warm-up began at nought; the rest of it is a step ahead of that."
    elif checkpoint is not None and checkpoint.step < ready.plan.steps:
        rate = rate_of(recipe.train, ready.plan.steps, ready.plan.warmup_steps)
        why += checkpoint.rate_told(recipe.train.learning_rate * rate(checkpoint.values["schedule"]))
    if checkpoint is not None and checkpoint.step < ready.plan.steps and checkpoint.ran_out_of(recipe.train.patience):
        why += (
            " Training is done: it ended there by train.patience. More of it takes another:"
            f" --set train.patience={2 * (recipe.train.patience or 1)} --allow-change train.patience."
        )
    return ready, GoingOn(checkpoint, Resumed(checkpoint.step if checkpoint else 0, why))


def refuse_full_disk(folder: Path, needed: int) -> None:
    """Raises MachineError where what a run leaves in `folder`, which need not be there yet, would not fit on its disk
    after it."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise MachineError(
            f"{folder}: the run needs {format_bytes(needed)} of disk and {format_bytes(free)} are free. Free some, or"
            " name an --output on another disk."
        )
