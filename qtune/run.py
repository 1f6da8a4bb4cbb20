"""The story of one run, in the order it happens."""

import contextlib
import dataclasses
import importlib.metadata
import shutil
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from qtune import __version__, logs, reading
from qtune.data import canaries
from qtune.data.packing import PackedRow, packed_rows
from qtune.data.prepare import Prepared, prepare
from qtune.data.tokenize import tokenizer_sha256
from qtune.errors import MachineError, UserError
from qtune.evaluate.before_after import Score, compare, score
from qtune.evaluate.held_out import HeldOut, scored_examples
from qtune.evaluate.held_out_loss import document_loss, held_out_loss
from qtune.evaluate.memorization import memorised
from qtune.events import Event, Listener, Memorised, Notice, Resumed
from qtune.hardware import Device, find_device
from qtune.lock import Lock, LockedBase, Quantization
from qtune.memory.memory_report import Ledger
from qtune.memory.oom_recovery import Climb, Recovery, pieces_to_begin_with
from qtune.memory.techniques import Engine
from qtune.model import adapter, base, fingerprint, packing_probe
from qtune.model.loaded import Loaded
from qtune.model.tokenizer import has_tokenizer_here, load_tokenizer
from qtune.plan.fake_model import refuse_unknown_targets
from qtune.plan.max_context import Longest
from qtune.plan.planner import Plan, Settled, decide, longest_on, refuse_unless_it_fits
from qtune.plan.workload import Work
from qtune.recipe.schema import Evaluate, Recipe
from qtune.report import model_card, plan_table, run_header, summary, tables
from qtune.report.dashboard import listener_for
from qtune.report.progress_line import Doing
from qtune.resume import Invocation, changes, recipe_then, refuse_changes
from qtune.rundir import RunDir, default_path, write_json
from qtune.train import checkpoint_files
from qtune.train.callbacks import HeldOutLoss
from qtune.train.checkpointer import Point
from qtune.train.loop import Fitted, Keeping, fit
from qtune.units import counted, format_bytes, format_percent

LOCKED_PACKAGES = ("torch", "bitsandbytes", "peft", "transformers", "trl", "datasets", "accelerate")
PROBE_ROWS = 64
VOCABULARY_ROWS = 8  # training rows whose tokens the packing probe draws from: some hundred different ones


@dataclass(frozen=True)
class Ready:
    """A recipe whose every claim has been checked: rows tokenised, choices settled, nothing loaded yet."""

    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    prepared: Prepared
    plan: Plan
    held_out: HeldOut


def get_ready(recipe: Recipe, settled: Settled | None = None, doing: Doing | None = None) -> Ready:
    """Read the data, settle the plan; `doing` hears how far that is.

    Raises a UserError for anything that could not be trained on, or not be scored afterwards.
    """
    base.quiet_libraries()
    doing = doing or Doing()
    with _finding(recipe, doing):
        config = base.read_config_alone(recipe.model)
    refuse_unknown_targets(config, recipe)
    doing(f"reading {recipe.data.train}")
    read = reading.read(recipe, doing.rows)
    doing("planning")
    plan = decide(recipe, find_device(), config, Work.of_prepared(read.prepared), settled)
    return Ready(recipe, read.tokenizer, read.prepared, plan, read.held_out)


def _finding(recipe: Recipe, doing: Doing) -> contextlib.AbstractContextManager[None]:
    """While the base's files are looked for, which the hub draws bars of if it is asked."""
    name = recipe.model.base
    if _is_on_hub(recipe):
        return doing.aside(f"asking the hub for {name}")
    doing(f"reading {name}")
    return contextlib.nullcontext()


def _is_on_hub(recipe: Recipe) -> bool:
    return recipe.model.base != "demo" and not Path(recipe.model.base).is_absolute()


def plan_without_downloads(recipe: Recipe, device: Device, doing: Doing) -> Plan:
    """The plan from config.json alone; rows are read where data and tokenizer are on this machine already.

    Raises a UserError for anything that could not be trained on.
    """
    base.quiet_libraries()
    with _finding(recipe, doing):
        config = base.read_config_alone(recipe.model)
    sources = [recipe.data.train, *([recipe.data.held_out] if recipe.data.held_out else [])]
    is_here = has_tokenizer_here(recipe.model) and all(Path(source).is_file() for source in sources)
    if not is_here:
        doing("planning")
        return decide(recipe, device, config, Work.of_full_sequences(recipe.data.max_tokens), weighs_all=True)
    doing(f"reading {recipe.data.train}")
    prepared = prepare(recipe, load_tokenizer(recipe.model), doing.rows)
    doing("planning")
    return decide(recipe, device, config, Work.of_prepared(prepared), weighs_all=True)


def longest_contexts(recipe: Recipe, devices: Sequence[Device], doing: Doing) -> list[tuple[Device, Longest]]:
    """The longest sequence that fits on each device, by whichever plan takes it furthest, and what bounds it."""
    base.quiet_libraries()
    with _finding(recipe, doing):
        config = base.read_config_alone(recipe.model)
    doing(f"planning for {counted(len(devices), 'card')}")
    return list(zip(devices, longest_on(recipe, devices, config), strict=True))


def show(ready: Ready, console: Console, with_row: bool = False) -> None:
    """What will be trained on, and how, before it starts: in brief, or whole where the plan does not fit."""
    data, plan = dataclasses.asdict(ready.prepared.report), ready.plan.as_json()
    if not ready.plan.fits:
        console.print(tables.data_table(data), plan_table.whole_plan(plan), sep="\n")
        return
    console.print(run_header.brief(ready.recipe.name, ready.recipe.model.base, data, plan))
    if with_row and data["sample"]:
        console.print(tables.sample_panel(data["sample"]))


def start_folder(ready: Ready, recipe_text: str, invocation: Invocation, output: Path | None) -> RunDir:
    """A new run folder that says what was asked for and what was settled, before anything can fail."""
    refuse_unless_it_fits(ready.recipe, ready.plan)
    path = output or default_path(ready.recipe.name, datetime.now())
    run = RunDir.create(path, recipe_text, dataclasses.asdict(invocation))
    logs.write_to(run.log)
    _describe(ready, run)
    return run


def _describe(ready: Ready, run: RunDir) -> None:
    write_json(run.plan, ready.plan.as_json())
    write_json(run.data, dataclasses.asdict(ready.prepared.report))
    write_json(run.probe, [example.input_ids for example in ready.prepared.held_out[:PROBE_ROWS]])


def get_ready_again(
    run: RunDir, recipe: Recipe, allowed: Sequence[str], doing: Doing
) -> tuple[Ready, Point | None, Resumed]:
    """What a run that was stopped needs to go on, the checkpoint it goes on from, and a sentence on that one.

    Raises RunFolderError where it no longer is what it was and that was not `allowed`, field by field, and where all
    its checkpoints are broken.
    """
    doing("looking for the newest whole checkpoint")
    path, why = checkpoint_files.choose(run.checkpoints)
    point = None if path is None else Point.read(path)
    is_replanned = any(field.startswith("memory.") for field in allowed)
    settled = None if point is None or is_replanned else Settled(point.techniques, point.micro_batch)
    ready = get_ready(recipe, settled, doing)
    refuse_unless_it_fits(recipe, ready.plan)
    if run.lock.is_file():
        doing(f"hashing {recipe.model.base}")
        before = dataclasses.replace(run.read_lock(), recipe=recipe_then(run).model_dump(mode="json"))
        now = lock_of(ready, before.quantized_modules)
        refuse_changes(run, changes(before, now), allowed)
        run.write_lock(now)
    logs.write_to(run.log)
    _describe(ready, run)
    if point is not None and point.warms_otherwise(ready.plan.warmup_steps):
        why += " Its warm-up began at nought; the rest of it is a step ahead of that."
    return ready, point, Resumed(point.step if point else 0, why)


def run(
    ready: Ready, folder: RunDir, console: Console, point: Point | None = None, resumed: Resumed | None = None
) -> Fitted:
    """Load, score, train, score again; everything worth keeping is in `folder` when this returns.

    With a `point` it goes on from there, as if it had never been stopped. The caller holds the folder.
    """
    recipe, plan = ready.recipe, ready.plan
    record = folder.record if point is None else folder.record_again
    one_at_a_time = threading.Lock()
    with _leaving_no_folder(folder, point):
        if _is_on_hub(recipe):  # the hub's own bars would be drawn into the dashboard
            console.print(f"getting the weights of {recipe.model.base}", style="dim", markup=False)
            base.base_folder(recipe.model)
    with listener_for(console, _title(recipe), plan.steps) as dashboard:

        def listen(event: Event) -> None:
            with one_at_a_time:  # what a signal does is said by a thread
                record(event)
                dashboard(event)

        folder.wind_back({} if point is None else point.journal_bytes)
        for event in folder.events():
            dashboard(event)
        if resumed is not None:
            listen(resumed)
        ledger = Ledger.begin(plan.device)
        with _leaving_no_folder(folder, point):
            model, engine = _load(ready, folder, ledger, listen, point)
            loaded = Loaded(model, ready.tokenizer, plan.device.name, plan.compute_dtype)
            ready = _probed(ready, folder, loaded, listen)
        plan = ready.plan
        pieces = pieces_to_begin_with(plan.documents_apart)
        recovery = Recovery(listen, _climber(plan, engine), engine.forget_pass, pieces)
        before = _base_score(ready, folder, loaded, recovery, listen, point)
        listen(ledger.measure("eval", 0, model, engine))
        record = folder.record
        fitted = _train(ready, loaded, engine, recovery, ledger, listen, Keeping(folder, point))
        listen(ledger.measure("save", fitted.steps, model, engine))
        if fitted.stopped_by is None:
            after = _score("tuned", ready, loaded, recovery, listen)
            told = _memorised(ready, loaded, listen)
            _keep_scores(folder, ready, before, after, told)
    summary.write_summary(folder)
    model_card.write_card(folder)
    return fitted


def _load(
    ready: Ready, folder: RunDir, ledger: Ledger, listen: Listener, point: Point | None
) -> tuple[PeftModel, Engine]:
    """The base with a fresh adapter, and the memory techniques of the plan switched on."""
    recipe, plan = ready.recipe, ready.plan
    listen(Notice(f"loading {recipe.model.base}"))
    check_disk(folder.path, plan.disk_bytes)
    loaded = base.load_base(recipe.model, plan.device.name, plan.compute_dtype, plan.techniques)
    if point is None:
        folder.write_lock(lock_of(ready, base.quantized_modules(loaded)))
    model = adapter.attach(loaded, recipe.lora, recipe.train.seed)
    listen(ledger.measure("load", 0, model))
    engine = Engine(model)
    engine.switch_to(plan.techniques)
    listen(ledger.measure("attach", 0, model, engine))
    return model, engine


@contextlib.contextmanager
def _leaving_no_folder(folder: RunDir, point: Point | None) -> Iterator[None]:
    """A run that the user must put right before it can start leaves no folder, unless it has begun already."""
    try:
        yield
    except UserError:
        if point is None and not folder.checkpoints.exists():
            shutil.rmtree(folder.path)
        raise


def _probed(ready: Ready, folder: RunDir, loaded: Loaded, listen: Listener) -> Ready:
    """`ready`, its plan settled on one document a pass where packed documents would read each other in this base.

    Raises ModelError for a base that is not itself under packed attention, not even with one document.
    """
    recipe, plan, train = ready.recipe, ready.plan, ready.prepared.train
    vocabulary = sorted({int(token) for i in range(min(VOCABULARY_ROWS, len(train))) for token in train.arrays(i)[0]})
    probed = packing_probe.probe(loaded, vocabulary, lambda document: document_loss(loaded, document))
    folder.write_lock(dataclasses.replace(folder.read_lock(), packing_probe=probed))
    packing_probe.refuse_another(probed, recipe.model.base)
    if not probed.leaks:
        return ready
    reason = f"documents in a pack read each other in this base (logits move by {format_percent(probed.moved_in_pack)})"
    listen(Notice(f"{reason}: each has a pass of its own, steps and losses stay those of packs"))
    ready = dataclasses.replace(ready, plan=plan.with_documents_apart(reason))
    write_json(folder.plan, ready.plan.as_json())
    return ready


def _title(recipe: Recipe) -> str:
    return f"{recipe.name}   {recipe.model.base}   LoRA rank {recipe.lora.rank}"


def _climber(plan: Plan, engine: Engine) -> Climb:
    """Switches on the next technique above the plan's, and names it; None when there is none left."""
    higher = iter(plan.reserve)

    def climb() -> str | None:
        rung = next(higher, None)
        if rung is None:
            return None
        engine.switch_to(rung.techniques)
        return rung.name

    return climb


def _train(
    ready: Ready,
    loaded: Loaded,
    engine: Engine,
    recovery: Recovery,
    ledger: Ledger,
    listen: Listener,
    keeping: Keeping,
) -> Fitted:
    plan, held_out = ready.plan, ready.held_out

    def loss_over(packs: Sequence[PackedRow]) -> float:
        return held_out_loss(loaded, packs, recovery)

    measured = None
    if held_out.packs:
        largest = max(held_out.packs, key=lambda pack: len(pack["input_ids"]))
        measured = HeldOutLoss(len(held_out.examples), lambda: loss_over(held_out.packs), lambda: loss_over([largest]))
    examples, packs = ready.prepared.train, ready.prepared.train_packs

    def places(rows: Sequence[int]) -> list[str]:
        return [examples[i].place for row in rows for i in packs[row]]

    return fit(
        ready.recipe,
        plan,
        loaded.model,
        engine,
        ready.tokenizer,
        packed_rows(examples, packs),
        measured,
        ledger,
        listen,
        keeping.run.path,
        recovery.climb,
        keeping,
        places,
    )


def _base_score(
    ready: Ready, run: RunDir, loaded: Loaded, recovery: Recovery, listen: Listener, point: Point | None
) -> Score | None:
    """The base's score, measured once: a run that goes on has it in its folder."""
    if point is not None and run.base_score.is_file():
        return run.read_as(run.base_score, Score.from_json)
    found = _score("base", ready, loaded, recovery, listen)
    if found is not None:
        write_json(run.base_score, dataclasses.asdict(found))
    return found


def _score(who: str, ready: Ready, loaded: Loaded, recovery: Recovery, listen: Listener) -> Score | None:
    """Base or tuned on the held-out rows, reported; None where there are none."""
    held_out, recipe = ready.held_out, ready.recipe
    if not held_out.packs:
        return None
    listen(Notice(f"scoring the {who} model: {_scored_on(held_out, recipe.evaluate)}"))
    result = score(who, loaded, held_out, recipe.evaluate, recovery)
    listen(result.event(recipe.evaluate.metric))
    return result


def _scored_on(held_out: HeldOut, wanted: Evaluate) -> str:
    """What is asked of each model: `loss of 20 held-out rows, 4 of them answered`."""
    rows, asked = len(held_out.examples), len(scored_examples(held_out, wanted))
    answered = f", {asked:,} of them answered" if asked < rows else ", all of them answered"
    return f"loss of {counted(rows, 'held-out row')}{answered if asked else ''}"


def _memorised(ready: Ready, loaded: Loaded, listen: Listener) -> Memorised | None:
    """What the tuned model tells of the canaries, reported; None where none was planted."""
    recipe = ready.recipe
    if not recipe.evaluate.canaries:
        return None
    listen(Notice(f"asking for the secrets of {counted(recipe.evaluate.canaries, 'canary')}"))
    phrasing = canaries.Phrasing.of(recipe, ready.prepared.report.format, ready.tokenizer)
    result = memorised(
        loaded,
        canaries.probes(canaries.planted(recipe), phrasing),
        canaries.probes(canaries.never_planted(recipe), phrasing),
        recipe.evaluate.canary_repeats,
        ready.prepared.stop_token_ids,
    )
    listen(result)
    return result


def _keep_scores(run: RunDir, ready: Ready, before: Score | None, after: Score | None, told: Memorised | None) -> None:
    if before is not None and after is not None:
        found = compare(before, after, ready.held_out, ready.recipe.evaluate, ready.recipe.train.seed)
        write_json(run.scores, {**found, "memorised": dataclasses.asdict(told) if told else None})


def check_disk(folder: Path, needed: int) -> None:
    """Raises MachineError before training where what it leaves would not fit on the disk after it."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise MachineError(
            f"{folder}: the run needs {format_bytes(needed)} of disk and {format_bytes(free)} are free. Free some, or"
            " name an --output on another disk."
        )


def lock_of(ready: Ready, quantized: Sequence[str]) -> Lock:
    """What this run stands on, by hash and version; merging and a later resume hold it against what they find."""
    recipe, model = ready.recipe, ready.recipe.model
    folder = base.base_folder(model)
    return Lock(
        name=recipe.name,
        base=LockedBase(model.base, str(folder), fingerprint.fingerprint(folder), fingerprint.glance(folder)),
        model=model.model_dump(mode="json"),
        recipe=recipe.model_dump(mode="json"),
        quantized_modules=tuple(quantized),
        quantization=Quantization("nf4", model.double_quantization) if quantized else None,
        device=ready.plan.device.name,
        compute_dtype=ready.plan.compute_dtype,
        data_sha256=ready.prepared.fingerprint,
        template_sha256=ready.prepared.template_fingerprint,
        tokenizer_sha256=tokenizer_sha256(ready.tokenizer),
        stop_token_ids=tuple(ready.prepared.stop_token_ids),
        seed=recipe.train.seed,
        versions={"qtune": __version__, **{name: importlib.metadata.version(name) for name in LOCKED_PACKAGES}},
    )
