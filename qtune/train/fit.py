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
from qtune.memory.techniques import Engine
from qtune.model.adapter import trained_parameters, use_master_dtype
from qtune.model.base import autocast
from qtune.plan.decide import Plan
from qtune.plan.work import largest_rows
from qtune.recipe.schema import Recipe
from qtune.train import rehearsal
from qtune.train.out_of_memory import Batch, Climb, OpenStep, Recovery, nothing_left, refusing
from qtune.train.settings import sft_config
from qtune.train.whole_steps import keep_steps_whole

SECONDS_BETWEEN_LEDGERS = 1.0


@dataclass(frozen=True)
class Fitted:
    """How training ended: `stopped_by` is the signal that cut it short, or None."""

    steps: int
    seconds: float
    stopped_by: signal.Signals | None


@dataclass(frozen=True)
class HeldOutLoss:
    """The held-out loss of the model as it stands: over all `rows`, and over the largest sequence of them alone."""

    rows: int
    of_all: Callable[[], float]
    of_largest: Callable[[], float]


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
    """SFTTrainer that counts what it is fed, and takes a step whole and on a loss that is a number, or not at all."""

    meter: Meter
    recovery: Recovery
    open_step: OpenStep

    @property
    def step_under_way(self) -> str:
        return f"Step {self.state.global_step + 1}"

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        keep_steps_whole(optimizer, self.recovery, lambda: self.step_under_way)
        return optimizer

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The batches of the next optimizer step."""
        start = time.perf_counter()
        samples, tokens = super().get_batch_samples(*args, **kwargs)
        self.meter.wait_seconds += time.perf_counter() - start
        self.open_step = OpenStep(self.recovery, self.step_under_way, self.args.device, self.model.zero_grad)
        return samples, tokens

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The summed loss over the tokens of the whole step; trl's own where the head does not allow tiles."""
        if tiled_loss.suits(self.model):
            output = model(**inputs, tiled_loss=True)
            loss = output.nats / (output.tokens if num_items_in_batch is None else num_items_in_batch)
        else:
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch, **kwargs)
        self.open_step.phase = "backward pass"
        return loss

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The batch's share of the step's loss, its gradient added; in pieces, and again, where memory asks for it."""
        self.meter.count(inputs)
        if num_items_in_batch is None:  # a model of the user's own that takes no such argument
            num_items_in_batch = (inputs["labels"][:, 1:] != -100).sum()

        def run(piece: Batch) -> torch.Tensor:
            return super(MeteredTrainer, self).training_step(model, piece, num_items_in_batch)

        loss = self.open_step.add(inputs, run)
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

    def __init__(
        self,
        trainer: MeteredTrainer,
        engine: Engine,
        listen: Listener,
        ledger: Ledger,
        held_out: HeldOutLoss | None,
    ):
        self.trainer, self.engine, self.listen, self.ledger, self.held_out = trainer, engine, listen, ledger, held_out
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
            self.measure("step", state.global_step + 1)

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

    def measure(self, phase: str, step: int) -> None:
        """Report the bytes of what was just done, which was `phase`."""
        self.listen(self.ledger.measure(phase, step, self.trainer.model, self.engine, self.trainer.optimizer))

    def evaluate(self, step: int) -> None:
        """Measure and report the held-out loss after `step` steps."""
        if self.held_out is None:
            return
        start = time.perf_counter()
        loss = self.held_out.of_all()
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


def rehearse_largest(
    trainer: MeteredTrainer, engine: Engine, plan: Plan, train: Sequence[PackedRow], climb: Climb
) -> tuple[rehearsal.Rehearsal, list[str]]:
    """The largest batch of `train` run once, and what had to be switched on for it."""
    batch = trainer._prepare_inputs(collate(largest_rows(train, plan.micro_batch)))
    trainer.open_step = OpenStep(trainer.recovery, "The rehearsal", trainer.args.device, trainer.model.zero_grad)

    def loss_of(batch: Batch) -> torch.Tensor:
        with autocast(plan.device.name, plan.compute_dtype):
            return trainer.compute_loss(trainer.model, batch)

    def run_once() -> rehearsal.Rehearsal:
        SFTTrainer.create_optimizer(trainer)
        optimizer, trainer.optimizer = trainer.optimizer, None
        accumulates = plan.gradient_accumulation > 1
        return rehearsal.rehearse(trainer.model, engine, optimizer, batch, loss_of, accumulates, plan.device)

    most = plan.budget.device_bytes - plan.device.outside_bytes
    return rehearsal.rehearse_until_it_fits(run_once, most, climb, engine.forget_pass)


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
) -> Fitted:
    """Train the adapter on `model` in place; `engine` holds the memory techniques it runs with.

    The largest batch is rehearsed first. Where memory runs out all the same, the step is done again with less
    (`train.out_of_memory`), `climb` being the next technique there is. Raises TrainingDiverged before a step on a loss
    or gradient that is not finite, and OutOfMemory for a step that does not fit: the weights are those of the last
    whole step.
    """
    trainer = MeteredTrainer(
        model=model,
        args=sft_config(recipe, plan, folder),
        data_collator=collate,
        train_dataset=Dataset.from_list([dict(row) for row in train]),
        processing_class=tokenizer,
    )
    trainer.recovery = Recovery(listen, climb, engine.forget_pass)
    trainer.remove_callback(PrinterCallback)
    use_master_dtype(model, recipe.lora.master_dtype)
    reporter, stop = Reporter(trainer, engine, listen, ledger, held_out), StopOnSignal()
    for callback in (EvaluateEvery(reporter, plan.eval_every), reporter, stop):
        trainer.add_callback(callback)
    if recipe.memory.rehearse:
        rehearsal.tell(listen, plan, *rehearse_largest(trainer, engine, plan, train, climb))
        if held_out is not None:
            held_out.of_largest()
            reporter.measure("eval", 0)
    listen(Started(plan.steps, len(train), held_out.rows if held_out else 0))
    trainer.meter, start = Meter(), time.perf_counter()
    with stop.watching(), refusing(lambda: trainer.step_under_way):
        trainer.train()
    fitted = Fitted(trainer.state.global_step, time.perf_counter() - start, stop.caught)
    listen(Finished(fitted.steps, fitted.seconds))
    return fitted
