"""trl's SFTTrainer, driven: rows in, events out, the adapter trained in place."""

import contextlib
import signal
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trl import SFTConfig

from qtune.data.packing import collate, seq_lengths
from qtune.distributed.ranks import ALONE, Ranks
from qtune.errors import MachineError, RankLost
from qtune.events import Finished, Listener, Started
from qtune.memory.oom_recovery import refusing
from qtune.memory.split_batch import split_batch
from qtune.model.adapter import use_master_dtype
from qtune.model.start_adapter import StartAdapter
from qtune.plan.workload import heaviest_first
from qtune.recipe.schema import Recipe
from qtune.rundir import RunDir
from qtune.train import dry_run
from qtune.train.callbacks import EvaluateEvery, NoisyEmbeddings, Reporter, TrackerCallback
from qtune.train.checkpoint_files import Checkpoint
from qtune.train.checkpointer import Saver, SaveWhen, train_from
from qtune.train.learner import Learner
from qtune.train.optimizers import Optimizer
from qtune.train.replicas import Shares
from qtune.train.rows import TrainingRows
from qtune.train.stop_signals import StepDropped, Stop
from qtune.train.trainer import Descent, MeteredTrainer, sft_config

if TYPE_CHECKING:
    from qtune.plan.plan import Plan


@dataclass(frozen=True)
class Fitted:
    """How training ended. `was_stopped` before its last step, where a signal did it `stopped_by` that one."""

    steps: int
    seconds: float
    was_stopped: bool
    stopped_by: signal.Signals | None


@dataclass(frozen=True)
class TrainingSession:
    """Everything that a training takes; `run` trains the adapter of `learner` in place.

    With `kept_in`, checkpoints and the adapter are written to that folder. One that goes on does so `going_on_from` a
    checkpoint of it, as if it had never been stopped. Of several `ranks` each has a session of its own, and trains what
    one would; the first writes.
    """

    recipe: Recipe
    plan: "Plan"
    learner: Learner
    rows: TrainingRows
    listen: Listener
    kept_in: RunDir | None = None
    going_on_from: Checkpoint | None = None
    ranks: Ranks = ALONE

    def run(self, stop: threading.Event | None = None, catches_signals: bool = False) -> Fitted:
        """Train to the end, or until `stop` is set, by whichever thread: then the step under way is the last.

        With `catches_signals` Ctrl-C and SIGTERM do as much; they can be caught on the main thread alone. The largest
        batch is rehearsed first, unless a checkpoint shows that it fits. Where memory runs out all the same, the step
        is done again with less (`memory.oom_recovery`). Raises TrainingDiverged before a step on a loss or gradient
        that is not finite, RankLost where another rank is gone, OutOfMemory for a step that does not fit and DiskFull
        for a checkpoint that does not: the weights are those of the last whole step.
        """
        checkpoint = self.going_on_from
        descent = Descent.of(self.recipe, self.plan)
        trainer = MeteredTrainer(self.learner, self._settings(), descent, self.rows, checkpoint, self.ranks)
        self._refuse_unlike_cards(descent.optimizer)
        trainer.shared.shares = self._shares()
        use_master_dtype(trainer.model, self.recipe.lora.master_dtype)
        if checkpoint is None and (start := StartAdapter.of(self.recipe.lora)):
            start.put_on(trainer.model)  # again, as the trainer rounded it
        told = self.recipe.report.to if self.ranks.is_first else None
        tracker = TrackerCallback(told, trainer, self.listen) if told else None
        noise = NoisyEmbeddings(trainer.model, self.recipe.train)
        reporter = self._reporter(trainer, tracker)
        stopping = Stop(trainer, self.listen, stop or threading.Event())
        saver = Saver(self.recipe, self.kept_in, trainer, reporter, self.listen) if self.kept_in else None
        when = SaveWhen(self.recipe.save.every, self.kept_in, reporter, stopping) if self.kept_in else None
        for callback in (EvaluateEvery(self.plan.eval_every), noise, reporter, stopping, tracker, when, saver):
            if callback is not None:
                trainer.add_callback(callback)
        if checkpoint is None:
            if self.recipe.memory.rehearse:
                self._rehearse(trainer)
            self.listen(Started(self.plan.steps, len(self.rows.packs), self.rows.held_out_rows))
        trainer.start_clock(0.0 if checkpoint is None else checkpoint.train_seconds)
        watched = stopping.catching_signals() if catches_signals else contextlib.nullcontext()
        try:
            with watched, refusing(lambda: trainer.step_under_way):
                steps = train_from(trainer, reporter.is_out_of_patience)
            if saver is not None and self.recipe.save.result == "best" and not stopping.is_asked:
                saver.go_to_best()
        except StepDropped:
            steps = trainer.state.global_step
            if saver is not None:
                saver.save_last_whole_step()
        except RankLost:
            if saver is not None:
                saver.save_last_whole_step()
            raise
        finally:  # the weights are those of a whole step, whatever ended training
            trainer.be_the_result()
            noise.remove()
            if saver is not None and trainer.has_begun:
                saver.save_adapter()
        caught = next((number for number in self.ranks.gather(stopping.caught) if number is not None), None)
        was_stopped = stopping.is_asked or caught is not None
        fitted = Fitted(steps, trainer.seconds, was_stopped, None if caught is None else signal.Signals(caught))
        is_early = reporter.is_out_of_patience and steps < self.plan.steps and not was_stopped
        self.listen(Finished(steps, fitted.seconds, reporter.without_better if is_early else 0))
        return fitted

    def _refuse_unlike_cards(self, optimizer: Optimizer) -> None:
        """Raises MachineError for ranks on cards of different kinds, which would not take the same step to the bit."""
        labels = self.ranks.gather(self.plan.device.label)
        if optimizer.rounds_by_card and len(set(labels)) > 1:
            raise MachineError(
                f'train.optimizer = "{optimizer.name}" multiplies matrices, which cards of different kinds round'
                f" otherwise: {', '.join(sorted(set(labels)))} would no longer train one run. Take another optimizer,"
                " or cards of one kind."
            )

    def _reporter(self, trainer: MeteredTrainer, tracker: TrackerCallback | None) -> Reporter:
        rows, patience = self.rows, self.recipe.train.patience
        reporter = Reporter(trainer, rows.held_out, self.listen, tracker, patience, rows.answers)
        if self.going_on_from is not None:
            reporter.resume(self.going_on_from.values["reporter"])
        return reporter

    def _shares(self) -> Shares:
        """Ranks are alike that have such a card, and what the plan switches on."""
        plan = self.plan
        kind, waits = f"{plan.device.label}, {plan.techniques}", plan.techniques.sharded_layers > 0
        return Shares.agreed(self.ranks, kind, plan.speed.pack_seconds, waits)

    def _settings(self) -> SFTConfig:
        folder = self.kept_in.path if self.kept_in else Path(tempfile.gettempdir(), "qtune")  # nothing is written there
        return sft_config(self.recipe, self.plan, folder)

    def _rehearse(self, trainer: MeteredTrainer) -> None:
        """Run the largest batch, and the largest held-out sequence, once; tell what they held."""
        plan, learner = self.plan, self.learner
        heaviest = heaviest_first(seq_lengths(self.rows.packs))[: plan.micro_batch].tolist()
        recovery = learner.recovery
        pieces = split_batch(collate([self.rows.packs[i] for i in heaviest]), recovery.pieces, recovery.together)
        batch = trainer._prepare_inputs(max(pieces, key=lambda piece: sum(piece["document_lengths"])))
        accumulates = plan.gradient_accumulation > 1

        def run_once() -> dry_run.Rehearsal:
            trainer.begin_step("The rehearsal")
            optimizer = trainer.optimizer_of_its_own()
            return dry_run.rehearse(
                trainer.model, learner.engine, optimizer, batch, trainer.loss_of, accumulates, plan.device
            )

        most = plan.budget.device_bytes - plan.device.outside_bytes
        with learner.loaded.passes_together():
            fits, climbed = dry_run.rehearse_until_it_fits(run_once, most, recovery.climb, recovery.forget_pass)
        dry_run.tell(self.listen, plan, fits, climbed)
        if self.rows.held_out is not None:
            self.rows.held_out.of_largest()
            self.listen(learner.measure("eval", 0, trainer.optimizer))
