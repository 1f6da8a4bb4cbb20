"""What the trainer's callbacks tell: events, the bytes held, the held-out loss; and a tracker, at arm's length:
whatever goes wrong in there ends no run."""

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState

from qtune import accelerator
from qtune.events import Answered, Evaluated, Listener, Notice, RanksStanding, StepDone
from qtune.memory.documents import documents_here
from qtune.model.adapter import trained_parameters
from qtune.recipe.schema import Train
from qtune.train.rows import HeldOutLoss
from qtune.train.trackers import TRACKERS, nobody_to_ask
from qtune.train.trainer import Meter, MeteredTrainer

SECONDS_BETWEEN_LEDGERS = 1.0
RISEN = 3.0  # times the first loss


class Reporter(TrainerCallback):
    """Turns the trainer's callbacks into our events; measures memory and the held-out loss on the way."""

    def __init__(
        self,
        trainer: MeteredTrainer,
        held_out: HeldOutLoss | None,
        listen: Listener,
        tracker: "TrackerCallback | None" = None,
        patience: int | None = None,
        answers: Callable[[], Sequence[tuple[str, str]]] | None = None,
    ):
        self.trainer, self.held_out, self.listen, self.tracker = trainer, held_out, listen, tracker
        self.patience, self.answers = patience, answers
        self.best_loss, self.best_step, self.measured_at = math.inf, 0, 0.0
        self.without_better = 0  # held-out losses since the best one
        self.first_loss: float | None = None
        self.has_warned, self.peak_bytes = False, 0

    @property
    def is_out_of_patience(self) -> bool:
        """Whether as many held-out losses in a row as `patience` were no better than the best."""
        return self.patience is not None and self.without_better >= self.patience

    def standing(self) -> dict[str, Any]:
        """What a resumed run has to know of the steps before it, as JSON."""
        best = {"loss": self.best_loss, "step": self.best_step} if self.best_step else None
        return {
            "best": best,
            "without_better": self.without_better,
            "first_loss": self.first_loss,
            "has_warned": self.has_warned,
        }

    def resume(self, standing: dict[str, Any]) -> None:
        best = standing["best"]
        if best is not None:
            self.best_loss, self.best_step = best["loss"], best["step"]
        self.without_better = standing.get("without_better", 0)  # older checkpoints did not count
        self.first_loss, self.has_warned = standing["first_loss"], standing["has_warned"]

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        parameters = trained_parameters(self.trainer.model)
        self.trainer.refuse_unless_finite([p.grad for p in parameters if p.grad is not None])

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        now = time.monotonic()
        if now - self.measured_at >= SECONDS_BETWEEN_LEDGERS or state.global_step == 0:
            self.measured_at = now
            measured = self.trainer.learner.measure("step", state.global_step + 1, self.trainer.optimizer)
            self.peak_bytes = max(self.peak_bytes, measured.peak_bytes)
            self.listen(measured)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.meter.steps += 1
        self.trainer.meter.loss += self.trainer.step_loss.item()

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, float], **kwargs: Any
    ) -> None:
        if "loss" not in logs:
            return
        meter, now = self.trainer.meter, time.perf_counter()
        self.trainer.meter = Meter()
        loss = meter.loss / meter.steps
        self.listen(
            StepDone(
                step=state.global_step,
                epoch=round(state.epoch or 0.0, 6),
                loss=loss,
                learning_rate=logs["learning_rate"],
                grad_norm=logs.get("grad_norm", 0.0),
                tokens=meter.tokens,
                trained_tokens=meter.trained_tokens,
                step_seconds=now - meter.since - meter.other_seconds,
                wait_seconds=meter.wait_seconds,
            )
        )
        if self.trainer.shared.are_shared:
            self.listen(RanksStanding(state.global_step, *self.trainer.shared.standing(self.peak_bytes)))
        self._warn_of_rise(loss, state.global_step)

    def _warn_of_rise(self, loss: float, step: int) -> None:
        """Say once that the loss is several times what it was at first."""
        if self.first_loss is None:
            self.first_loss = loss
        if not self.has_warned and loss > RISEN * self.first_loss:
            self.has_warned = True
            self.listen(
                Notice(
                    f"The loss at step {step:,} is {loss:.3g}, {loss / self.first_loss:.1f} times that of the first"
                    " step. A learning rate that is too high does this; Ctrl-C keeps what there is."
                )
            )

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.evaluate(state.global_step)
        self.ask(state.global_step)
        control.should_training_stop |= self.is_out_of_patience
        self.trainer.may_drop = False

    def evaluate(self, step: int) -> None:
        """Measure and report the held-out loss after `step` steps."""
        if self.held_out is None:
            return
        start = time.perf_counter()
        self.trainer.be_the_result()
        loss, by_source = self.held_out.of_all()
        seconds = time.perf_counter() - start
        self.trainer.meter.other_seconds += seconds
        is_best = loss < self.best_loss
        self.without_better = 0 if is_best else self.without_better + 1
        if is_best:
            self.best_loss, self.best_step = loss, step
        self.listen(Evaluated(step, loss, is_best, seconds, tuple(by_source.items())))
        if self.tracker is not None:
            self.tracker.tell_held_out(loss)

    def ask(self, step: int) -> None:
        """Have the prompts that are watched answered, and report that."""
        if self.answers is None:
            return
        start = time.perf_counter()
        self.trainer.be_the_result()
        pairs = self.answers()
        seconds = time.perf_counter() - start
        self.trainer.meter.other_seconds += seconds
        self.listen(Answered(step, tuple(asked for asked, _ in pairs), tuple(told for _, told in pairs), seconds))


class NoisyEmbeddings(TrainerCallback):
    """NEFTune (arXiv:2310.05914): in training passes, noise on what the embedding gives, even from -a to a, where a is
    `neftune_alpha` / sqrt(L H) for a document of L tokens, H wide.

    A document's follows from the seed, the step and its tokens. So it is the same whatever else is in the pass, on
    which rank, and in a pass that is run again. Costs: as many numbers drawn as there are elements, one document at a
    time, and its tokens copied to the host once a pass.
    """

    def __init__(self, model: PeftModel, train: Train):
        self._embedding = model.get_base_model().get_input_embeddings()
        self._alpha, self._seed, self._step = train.neftune_alpha, train.seed, 0
        self._hook: RemovableHandle | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._alpha:
            self._hook = self._embedding.register_forward_hook(self._add)

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._step = state.global_step + 1

    def remove(self) -> None:
        if self._hook is not None:
            self._hook.remove()

    def _add(self, embedding: torch.nn.Module, given: tuple[torch.Tensor], embedded: torch.Tensor) -> torch.Tensor:
        """`embedded` (B, T, H) of the tokens (B, T)."""
        if not (embedding.training and torch.is_grad_enabled()):
            return embedded
        ids = accelerator.to_host(given[0])
        lengths = documents_here() or [ids.shape[-1]] * len(ids)
        noise = [self._noise(document, embedded) for document in ids.flatten().split(tuple(lengths))]
        return embedded + torch.cat(noise).view_as(embedded)

    def _noise(self, document: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """(L, H), of the tokens (L,) of a document."""
        said = f"{self._seed} {self._step} {document.tolist()}"
        drawn = int.from_bytes(hashlib.sha256(said.encode()).digest()[:7])
        size, generator = (len(document), like.shape[-1]), torch.Generator(like.device).manual_seed(drawn)
        most = self._alpha / math.sqrt(size[0] * size[1])
        return torch.empty(size, device=like.device).uniform_(-most, most, generator=generator).to(like.dtype)


class EvaluateEvery(TrainerCallback):
    """The held-out loss every so many steps, and after the last one."""

    def __init__(self, every: int):
        self.every = every

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_evaluate |= state.global_step % self.every == 0 or state.global_step == state.max_steps


MOST_TOLD = 200  # characters of a failure


class TrackerCallback(TrainerCallback):
    """What tells the tracker `name`, dropped with a notice at the first exception out of it.

    It hears of the beginning, the end and the losses, and never of checkpoints, which it would upload; its seconds are
    not counted as a step's.
    """

    def __init__(self, name: str, trainer: MeteredTrainer, listen: Listener):
        self._name, self._trainer, self._listen = name, trainer, listen
        self._theirs: TrainerCallback | None = None

    def _make(self) -> None:
        self._theirs = TRACKERS[self._name].made()

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._safely(self._make)
        self._tell("on_train_begin", **kwargs)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._tell("on_log", **kwargs)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._tell("on_train_end", **kwargs)

    def tell_held_out(self, loss: float) -> None:
        """Ours is no evaluation of the trainer's, so the tracker would not hear of it."""
        self._tell("on_log", model=self._trainer.model, logs={"eval_loss": loss})

    def _tell(self, event: str, **kwargs: Any) -> None:
        trainer, theirs = self._trainer, self._theirs
        if theirs is not None:
            self._safely(lambda: getattr(theirs, event)(trainer.args, trainer.state, trainer.control, **kwargs))

    def _safely(self, act: Callable[[], object]) -> None:
        start = time.perf_counter()
        try:
            with nobody_to_ask():
                act()
        except Exception as fault:  # trackers fail in as many ways as there are networks
            self._theirs = None
            told = (str(fault).strip() or type(fault).__name__).splitlines()[0][:MOST_TOLD].rstrip(".")
            self._listen(Notice(f"{self._name} failed and is told no more: {told}. The run goes on, and keeps it all."))
        self._trainer.meter.other_seconds += time.perf_counter() - start
