"""A run told to an experiment tracker, at arm's length: whatever goes wrong in there ends no run."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from qtune.events import Listener, Notice
from qtune.train.trackers import TRACKERS, nobody_to_ask

if TYPE_CHECKING:
    from qtune.train.trainer import MeteredTrainer

MOST_TOLD = 200  # characters of a failure


class TrackerCallback(TrainerCallback):
    """What tells the tracker `name`, dropped with a notice at the first exception out of it.

    It hears of the beginning, the end and the losses, and never of checkpoints, which it would upload; its seconds are
    not counted as a step's.
    """

    def __init__(self, name: str, trainer: "MeteredTrainer", listen: Listener):
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
