"""trl's SFTTrainer, driven: rows in, events out, the adapter trained in place."""

import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, PrinterCallback
from trl import SFTTrainer

from qtune.data.packing import PackedRow, collate
from qtune.events import Finished, Listener, Started
from qtune.memory.memory_report import Ledger
from qtune.memory.oom_recovery import Batch, Climb, OpenStep, Recovery, nothing_left, pieces_to_begin_with, refusing
from qtune.memory.split_batch import split_batch
from qtune.memory.techniques import Engine
from qtune.model.adapter import use_master_dtype
from qtune.model.loaded import autocast
from qtune.plan.planner import Plan
from qtune.plan.workload import largest_rows
from qtune.recipe.schema import Recipe
from qtune.rundir import RunDir
from qtune.train import dry_run
from qtune.train.callbacks import EvaluateEvery, HeldOutLoss, Reporter
from qtune.train.checkpointer import Point, PutBack, Saver, SaveWhen, train_from
from qtune.train.sampler import DataOrder
from qtune.train.sft_config import sft_config
from qtune.train.stop_signals import StepDropped, StopOnSignal
from qtune.train.tracker_callback import TrackerCallback
from qtune.train.trainer import Meter, MeteredTrainer


@dataclass(frozen=True)
class Fitted:
    """How training ended: `stopped_by` is the signal that cut it short, or None."""

    steps: int
    seconds: float
    stopped_by: signal.Signals | None


@dataclass(frozen=True)
class Keeping:
    """Where checkpoints are kept, and the one to go on from; None begins."""

    run: RunDir
    going_on_from: Point | None = None


def no_places(rows: Sequence[int]) -> list[str]:
    return []


def rehearse_largest(
    trainer: MeteredTrainer, engine: Engine, plan: Plan, train: Sequence[PackedRow], climb: Climb
) -> tuple[dry_run.Rehearsal, list[str]]:
    """The largest batch of `train` run once, and what had to be switched on for it."""
    pieces = split_batch(collate(largest_rows(train, plan.micro_batch)), trainer.recovery.pieces)
    batch = trainer._prepare_inputs(max(pieces, key=lambda piece: sum(piece["document_lengths"])))
    trainer.open_step = OpenStep(trainer.recovery, "The rehearsal", trainer.args.device, trainer.model.zero_grad)

    def loss_of(batch: Batch) -> torch.Tensor:
        with autocast(plan.device.name, plan.compute_dtype):
            return trainer.compute_loss(trainer.model, batch)

    def run_once() -> dry_run.Rehearsal:
        SFTTrainer.create_optimizer(trainer)
        optimizer, trainer.optimizer = trainer.optimizer, None
        accumulates = plan.gradient_accumulation > 1
        return dry_run.rehearse(trainer.model, engine, optimizer, batch, loss_of, accumulates, plan.device)

    most = plan.budget.device_bytes - plan.device.outside_bytes
    return dry_run.rehearse_until_it_fits(run_once, most, climb, engine.forget_pass)


def fit(
    recipe: Recipe,
    plan: Plan,
    model: PeftModel,
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[PackedRow],
    held_out: HeldOutLoss | None,
    ledger: Ledger,
    listen: Listener,
    folder: Path,
    climb: Climb = nothing_left,
    keeping: Keeping | None = None,
    places: Callable[[Sequence[int]], list[str]] = no_places,
) -> Fitted:
    """Train the adapter on `model` in place; `engine` holds the memory techniques it runs with.

    The largest batch is rehearsed first, unless a checkpoint shows that it fits. Where memory runs out all the same,
    the step is done again with less (`memory.oom_recovery`), `climb` being the next technique there is. `places` names
    the rows of the data that sequences of `train` were made of. Raises TrainingDiverged before a step on a loss or
    gradient that is not finite, OutOfMemory for a step that does not fit and DiskFull for a checkpoint that does not:
    the weights are those of the last whole step.
    """
    trainer = MeteredTrainer(
        model=model,
        args=sft_config(recipe, plan, folder),
        data_collator=collate,
        train_dataset=Dataset.from_list([dict(train[0])]),  # trl takes no other class, and looks at one row
        processing_class=tokenizer,
    )
    trainer.train_dataset = train
    trainer.recovery = Recovery(listen, climb, engine.forget_pass, pieces_to_begin_with(plan.documents_apart))
    trainer.order, trainer.places = DataOrder(len(train), recipe.train.seed), places
    trainer.remove_callback(PrinterCallback)
    use_master_dtype(model, recipe.lora.master_dtype)
    tracker = TrackerCallback(recipe.report.to, trainer, listen) if recipe.report.to else None
    reporter, stop = Reporter(trainer, engine, listen, ledger, held_out, tracker), StopOnSignal(trainer, listen)
    trainer.evaluate_now = reporter.evaluate
    for callback in (EvaluateEvery(plan.eval_every), reporter, stop, *([tracker] if tracker else [])):
        trainer.add_callback(callback)
    saver, point = None, None
    if keeping is not None:
        point = keeping.going_on_from
        saver = Saver(recipe, keeping.run, trainer, engine, reporter, listen)
        _keep(keeping, saver, trainer, reporter, stop)
    if point is None:
        if recipe.memory.rehearse:
            _rehearse(trainer, engine, plan, train, climb, held_out, reporter, listen)
        listen(Started(plan.steps, len(train), held_out.rows if held_out else 0))
    trainer.meter = Meter()
    trainer.began = time.perf_counter() - (0.0 if point is None else point.values["train_seconds"])
    try:
        with stop.watching(), refusing(lambda: trainer.step_under_way):
            steps = train_from(trainer, 0 if point is None else point.step)
    except StepDropped:
        steps = trainer.state.global_step
        if saver is not None:
            saver.save_last_whole_step()
    finally:  # the weights are those of the last whole step, whatever ended training
        if saver is not None and trainer.has_begun:
            saver.save_adapter()
    fitted = Fitted(steps, time.perf_counter() - trainer.began, stop.caught)
    listen(Finished(fitted.steps, fitted.seconds))
    return fitted


def _keep(keeping: Keeping, saver: Saver, trainer: MeteredTrainer, reporter: Reporter, stop: StopOnSignal) -> None:
    """Have checkpoints written when they are due, and the one to go on from put back."""
    trainer.save_now, trainer.note_standing = saver.save, saver.note_standing
    trainer.add_callback(SaveWhen(saver.every, keeping.run.checkpoint_request, reporter, stop))
    point = keeping.going_on_from
    if point is not None:
        trainer.add_callback(PutBack(lambda: saver.put_back(point)))
        trainer.put_adapter_back = lambda: saver.put_adapter_back(point)
        trainer.wind_random_back = lambda: saver.put_random_back(point)


def _rehearse(
    trainer: MeteredTrainer,
    engine: Engine,
    plan: Plan,
    train: Sequence[PackedRow],
    climb: Climb,
    held_out: HeldOutLoss | None,
    reporter: Reporter,
    listen: Listener,
) -> None:
    dry_run.tell(listen, plan, *rehearse_largest(trainer, engine, plan, train, climb))
    if held_out is not None:
        held_out.of_largest()
        reporter.measure("eval", 0)
