"""A run's standing between two steps: taken into a checkpoint, and put back as if there had been no break."""

import json
import shutil
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState

from qtune import atomic_files
from qtune.errors import RunFolderError
from qtune.events import CheckpointSaved, Listener, Notice, Saved
from qtune.model import adapter
from qtune.recipe.schema import Recipe
from qtune.rundir import RunDir
from qtune.train import checkpoint_files
from qtune.train.callbacks import Reporter
from qtune.train.checkpoint_files import FORMAT, Checkpoint
from qtune.train.lr_schedule import wind
from qtune.train.optimizer_state import put_optimizer_back, take_optimizer, take_random
from qtune.train.replicas import refuse_unlike
from qtune.train.stop_signals import Stop
from qtune.train.trainer import Meter, MeteredTrainer
from qtune.units import parse_seconds


class Saver(TrainerCallback):
    """Writes the checkpoints of one run, and puts back the one that it goes on from."""

    def __init__(self, recipe: Recipe, run: RunDir, trainer: MeteredTrainer, reporter: Reporter, listen: Listener):
        self._recipe, self._run, self._listen = recipe, run, listen
        self._trainer, self._reporter = trainer, reporter
        self._names = {weight: name for name, weight in trainer.model.named_parameters()}
        self._best: str | None = None
        self._saved_step = 0

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        held: Any = self._trainer.optimizer
        optimizer: torch.optim.Optimizer = getattr(held, "optimizer", held)  # accelerate wraps it
        return optimizer

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The trainer has made its optimizer and its schedule, and knows of no checkpoint of ours."""
        if self._trainer.going_on_from is not None:
            self._put_back(self._trainer.going_on_from)

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Raises RanksDiffer where the ranks of the run have not taken the same steps."""
        trained = ((name, weight) for weight, name in self._names.items() if weight.requires_grad)
        refuse_unlike(self._trainer.shared.ranks, trained, state.global_step)
        self.save()

    def save(self) -> None:
        """A checkpoint of the step that was just done, by the first rank. Raises DiskFull; older checkpoints stay."""
        if not self._trainer.shared.ranks.is_first:
            return
        start, step = time.perf_counter(), self._trainer.state.global_step
        if self._reporter.best_step == step:
            self._best = checkpoint_files.NAME.format(step)
        path = checkpoint_files.write(self._run.checkpoints, step, self._fill)
        self._saved_step = step
        best = None if self._best is None else self._run.checkpoints / self._best
        checkpoint_files.prune(self._run.checkpoints, path, self._recipe.save.keep, best)
        seconds = time.perf_counter() - start
        self._trainer.meter.other_seconds += seconds
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        self._listen(CheckpointSaved(step, path.name, size, seconds))

    def save_last_whole_step(self) -> None:
        """A checkpoint of the last whole step when the one after it was dropped, unless there is one."""
        if self._trainer.standing is not None and self._saved_step != self._trainer.state.global_step:
            self._trainer.put_standing_back()
            self.save()

    def go_to_best(self) -> None:
        """Give the adapter the weights that it had at the best held-out loss, on every rank.

        Raises RunFolderError where the checkpoint that holds them is gone or broken.
        """
        trainer = self._trainer
        best, before = self._best, trainer.going_on_from
        if best is None and before is not None:  # a run whose steps were all done puts no standing back
            best = before.values["best"]
        path = trainer.shared.ranks.broadcast(None if best is None else str((self._run.checkpoints / best).absolute()))
        if path is None:  # no held-out loss was a number
            self._listen(Notice("no held-out loss was a number: the adapter is that of the last step"))
            return
        if broken := atomic_files.what_is_broken(Path(path)):
            raise RunFolderError(f'{path}: {broken}, and save.result = "best" takes the adapter from there.')
        checkpoint = Checkpoint.read(Path(path))
        put_adapter_back(trainer, checkpoint)
        self._listen(Notice(f"the adapter is that of step {checkpoint.step:,}, whose held-out loss is the best"))

    def _fill(self, folder: Path) -> None:
        self._trainer.be_the_result()
        adapter.save(self._trainer.model, folder / checkpoint_files.ADAPTER, self._recipe.model.base)
        tensors, optimizer = take_optimizer(self._optimizer, self._names)
        save_file(tensors, folder / checkpoint_files.OPTIMIZER)
        tensors, numbers = take_random(self._trainer.args.device)
        save_file(tensors, folder / checkpoint_files.RANDOM)
        shutil.copyfile(self._run.lock, folder / checkpoint_files.LOCK)
        values = {"format": FORMAT, **self._standing(), "optimizer": optimizer, "random": numbers}
        (folder / checkpoint_files.STATE).write_text(json.dumps(values), encoding="utf-8")

    def _standing(self) -> dict[str, Any]:
        trainer = self._trainer
        scaler = trainer.accelerator.scaler
        return {
            "step": trainer.state.global_step,
            "micro_batch": trainer.args.per_device_train_batch_size,
            "techniques": asdict(trainer.learner.engine.techniques),
            "pieces": trainer.learner.recovery.pieces,
            "schedule": trainer.lr_scheduler.state_dict()["last_epoch"],
            "next_rate": trainer.lr_scheduler.get_last_lr()[0],
            "scaler": None if scaler is None else scaler.state_dict(),
            "meter": trainer.meter.as_json(),
            "reporter": self._reporter.standing(),
            "best": self._best,
            "shares": trainer.shared.shares.of_ranks,
            "train_seconds": trainer.seconds,
            "journal_bytes": self._run.journal_bytes(),
        }

    def save_adapter(self) -> None:
        """The adapter as it stands, for answering, merging and serving, in place of an older one; by the first rank.
        Raises DiskFull."""
        if not self._trainer.shared.ranks.is_first:
            return
        start = time.perf_counter()
        with atomic_files.filled_in_place(self._run.adapter) as folder:
            size = adapter.save(self._trainer.model, folder, self._recipe.model.base)
        self._listen(Saved("adapter", size, time.perf_counter() - start))

    def _put_back(self, checkpoint: Checkpoint) -> None:
        """Bring trainer, adapter and optimizer to where it was taken, all but the random numbers."""
        trainer, values = self._trainer, checkpoint.values
        optimizer = load_file(checkpoint.path / checkpoint_files.OPTIMIZER)
        put_optimizer_back(self._optimizer, self._names, optimizer, values["optimizer"])
        put_adapter_back(trainer, checkpoint)
        self._wind_schedule(values["schedule"])
        if values["scaler"] is not None:
            trainer.accelerator.scaler.load_state_dict(values["scaler"])
        trainer.learner.recovery.pieces = values["pieces"]
        trainer.meter = Meter.from_json(values["meter"])
        self._best = values["best"]
        shares = trainer.shared.shares
        if shares.are_measured and len(values.get("shares", ())) == len(shares.of_ranks):
            shares.of_ranks = values["shares"]

    def _wind_schedule(self, steps: int) -> None:
        """The schedule of the recipe as it is now, `steps` steps on; with what was saved a new rate would not count."""
        scheduler: Any = self._trainer.lr_scheduler
        wind(getattr(scheduler, "scheduler", scheduler), steps)  # accelerate wraps it


class SaveWhen(TrainerCallback):
    """Says when a checkpoint is due: at its interval, at the best held-out loss, at the end, on a signal or request."""

    def __init__(self, every: int | str, run: RunDir, reporter: Reporter, stop: Stop):
        self.every, self.request = _interval(every), run.checkpoint_request
        self.reporter, self.stop = reporter, stop
        self.saved_at = time.monotonic()
        self._shared = reporter.trainer.shared
        self._shared.asks["save"] = lambda: (
            self._shared.ranks.is_first and (self.request.exists() or self._is_overdue())
        )

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        is_last = state.global_step >= state.max_steps or self.stop.is_asked
        if is_last or self._is_due(state.global_step) or self._shared.any_says("save"):
            self.request.unlink(missing_ok=True)
            self._save(control)

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        is_last = self.reporter.is_out_of_patience or self.stop.is_asked
        if is_last or self.reporter.best_step == state.global_step:
            self._save(control)

    def _save(self, control: TrainerControl) -> None:
        self.saved_at = time.monotonic()
        control.should_save = True

    def _is_due(self, step: int) -> bool:
        """An `every` that is whole counts steps, any other seconds by the clock of the first rank."""
        return isinstance(self.every, int) and step % self.every == 0

    def _is_overdue(self) -> bool:
        return not isinstance(self.every, int) and time.monotonic() - self.saved_at >= self.every


def _interval(every: int | str) -> int | float:
    """Steps between checkpoints if whole, else seconds."""
    if isinstance(every, int):
        return every
    seconds = parse_seconds(every)
    assert seconds is not None, "checked by the schema"
    return seconds


def train_from(trainer: MeteredTrainer, is_out_of_patience: bool) -> int:
    """Train all steps, or those after the checkpoint to go on from; says after how many training ended.

    The trainer finds its place in the data by a state file that says no more. Of a run whose steps are all done, or
    that is out of patience, there is only what was saved to put back, as the trainer would take one more.
    """
    checkpoint = trainer.going_on_from
    if checkpoint is None or checkpoint.step == 0:
        trainer.train()
    elif checkpoint.step < trainer.args.max_steps and not is_out_of_patience:
        state = TrainerState(global_step=checkpoint.step, train_batch_size=trainer.args.train_batch_size)
        state.compute_steps(trainer.args, trainer.args.max_steps)
        with tempfile.TemporaryDirectory(prefix="qtune-") as folder:
            state.save_to_json(str(Path(folder) / "trainer_state.json"))
            trainer.train(resume_from_checkpoint=folder)
    else:
        put_adapter_back(trainer, checkpoint)
        return checkpoint.step
    return int(trainer.state.global_step)


def put_adapter_back(trainer: MeteredTrainer, checkpoint: Checkpoint) -> None:
    adapter.put_back(trainer.model, checkpoint.path / checkpoint_files.ADAPTER)
    trainer.has_begun = True
