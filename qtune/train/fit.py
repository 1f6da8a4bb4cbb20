"""trl's SFTTrainer, driven: rows in, events out, the adapter trained in place."""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback, TrainerControl, TrainerState
from trl import SFTTrainer

from qtune.data.packing import PackedRow, collate
from qtune.errors import TrainingDiverged
from qtune.events import Evaluated, Finished, Listener, Started, StepDone
from qtune.memory import tiled_loss
from qtune.memory.ledger import Ledger
from qtune.model.adapter import trained_parameters, use_master_dtype
from qtune.plan.decide import Plan
from qtune.recipe.schema import Recipe
from qtune.train.settings import sft_config

SECONDS_BETWEEN_LEDGERS = 1.0


@dataclass(frozen=True)
class Fitted:
    """How training ended: `stopped_by` is the signal that cut it short, or None."""

    steps: int
    seconds: float
    stopped_by: signal.Signals | None


@dataclass
class Meter:
    """What passed through the trainer since the last log line."""

    tokens: int = 0
    trained_tokens: int = 0
    wait_seconds: float = 0.0
    eval_seconds: float = 0.0
    since: float = field(default_factory=time.perf_counter)

    def count(self, inputs: dict[str, Any]) -> None:
        self.tokens += inputs["input_ids"].numel()
        self.trained_tokens += int((inputs["labels"] != -100).sum())


class MeteredTrainer(SFTTrainer):
    """SFTTrainer that counts what it is fed and never takes a step on a loss that is no number."""

    meter: Meter

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        samples = super().get_batch_samples(*args, **kwargs)
        self.meter.wait_seconds += time.perf_counter() - start
        return samples

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The summed loss over the tokens of the whole step; trl's own where the head does not allow tiles."""
        if not tiled_loss.suits(self.model):
            return super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch, **kwargs)
        output = model(**inputs, tiled_loss=True)
        return output.nats / (output.tokens if num_items_in_batch is None else num_items_in_batch)

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        self.meter.count(inputs)
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not torch.isfinite(loss):
            raise diverged(self.state.global_step + 1, "loss", self.args.learning_rate)
        return loss


def diverged(step: int, what: str, learning_rate: float) -> TrainingDiverged:
    return TrainingDiverged(
        f"Step {step}: the {what} is not a finite number, so the step was not taken. The usual cause is a learning"
        f" rate that is too high (train.learning_rate is {learning_rate:g}); a tenth of it is a good next try."
    )


class Reporter(TrainerCallback):
    """Turns the trainer's callbacks into our events; measures memory and the held-out loss on the way."""

    def __init__(self, trainer: MeteredTrainer, listen: Listener, ledger: Ledger, held_out: Callable[[], float] | None):
        self.trainer, self.listen, self.ledger, self.held_out = trainer, listen, ledger, held_out
        self.best_loss, self.measured_at = float("inf"), 0.0

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        gradients = [p.grad for p in trained_parameters(self.trainer.model) if p.grad is not None]
        is_finite = torch.isfinite(torch.nn.utils.get_total_norm(gradients))
        if not is_finite and not args.fp16:  # with fp16 the gradient scaler skips such a step and halves its scale
            raise diverged(state.global_step + 1, "gradient", args.learning_rate)

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        now = time.monotonic()
        if now - self.measured_at >= SECONDS_BETWEEN_LEDGERS or state.global_step == 0:
            self.measured_at = now
            self.listen(self.ledger.measure(state.global_step + 1, self.trainer.model, self.trainer.optimizer))

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, float], **kwargs: Any
    ) -> None:
        if "loss" not in logs:
            return
        meter, now = self.trainer.meter, time.perf_counter()
        self.trainer.meter = Meter()
        self.listen(
            StepDone(
                step=state.global_step,
                epoch=round(state.epoch or 0.0, 6),
                loss=logs["loss"],
                learning_rate=logs["learning_rate"],
                grad_norm=logs.get("grad_norm", 0.0),
                tokens=meter.tokens,
                trained_tokens=meter.trained_tokens,
                step_seconds=now - meter.since - meter.eval_seconds,
                wait_seconds=meter.wait_seconds,
            )
        )

    def evaluate(self, step: int) -> None:
        """Measure and report the held-out loss after `step` steps."""
        if self.held_out is None:
            return
        start = time.perf_counter()
        loss = self.held_out()
        seconds = time.perf_counter() - start
        self.trainer.meter.eval_seconds += seconds
        is_best, self.best_loss = loss < self.best_loss, min(loss, self.best_loss)
        self.listen(Evaluated(step, loss, is_best, seconds))


class EvaluateEvery(TrainerCallback):
    """The held-out loss every so many steps, and after the last one."""

    def __init__(self, reporter: Reporter, every: int):
        self.reporter, self.every = reporter, every

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.reporter.evaluate(state.global_step)


class StopOnSignal(TrainerCallback):
    """Ctrl-C or SIGTERM lets the step finish and ends training; a second one ends it at once."""

    def __init__(self) -> None:
        self.caught: signal.Signals | None = None

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_training_stop |= self.caught is not None

    @contextmanager
    def watching(self) -> Iterator[None]:
        def note(number: int, frame: Any) -> None:
            if self.caught is not None:
                raise KeyboardInterrupt
            self.caught = signal.Signals(number)

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def fit(
    recipe: Recipe,
    plan: Plan,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[PackedRow],
    held_out_rows: int,
    held_out: Callable[[], float] | None,
    ledger: Ledger,
    listen: Listener,
    folder: Path,
) -> Fitted:
    """Train the adapter on `model` in place. `held_out` gives the held-out loss of the model as it stands.

    Raises TrainingDiverged before a step on a loss or gradient that is not finite: the weights stay as they were.
    """
    trainer = MeteredTrainer(
        model=model,
        args=sft_config(recipe, plan, folder),
        data_collator=collate,
        train_dataset=Dataset.from_list([dict(row) for row in train]),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    use_master_dtype(model, recipe.lora.master_dtype)
    reporter, stop = Reporter(trainer, listen, ledger, held_out), StopOnSignal()
    for callback in (EvaluateEvery(reporter, plan.eval_every), reporter, stop):
        trainer.add_callback(callback)
    listen(Started(plan.steps, len(train), held_out_rows))
    trainer.meter, start = Meter(), time.perf_counter()
    with stop.watching():
        trainer.train()
    fitted = Fitted(trainer.state.global_step, time.perf_counter() - start, stop.caught)
    listen(Finished(fitted.steps, fitted.seconds))
    return fitted
