"""Training asked to end: Ctrl-C and SIGTERM, of which the first lets the step finish, a second drops it and a third
ends everything; or an event set by whoever runs it, which is as much as the first."""

import queue
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from qtune.events import Listener, Stopping

if TYPE_CHECKING:
    from qtune.train.trainer import MeteredTrainer

ONE_WISH_SECONDS = 1.0  # chosen: Ctrl-C comes from the terminal and, of one of several processes, from its launcher too
NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class StepDropped(BaseException):
    """The step under way was given up; the weights are those of the last whole one."""


class Stop(TrainerCallback):
    """Ends training after the step in which it was asked to; `asked` is set from outside, by any thread.

    `caught` is the last signal there was. What a signal does is said at once, by a thread of its own: the handler
    may have broken into the very writing of a line. One of several ranks ends all, after the same step; they drop a
    step where they add up what their passes made."""

    def __init__(self, trainer: "MeteredTrainer", listen: Listener, asked: threading.Event):
        self._trainer, self._listen, self._asked = trainer, listen, asked
        self._to_say: queue.SimpleQueue[Stopping | None] = queue.SimpleQueue()
        self._signals, self._noted_at = 0, -ONE_WISH_SECONDS
        self.caught: signal.Signals | None = None
        trainer.shared.asks["stop"] = lambda: self.caught is not None or asked.is_set()
        trainer.shared.asks["drop"] = lambda: trainer.drops_step

    @property
    def is_asked(self) -> bool:
        return self._trainer.shared.any_says("stop")

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._trainer.shared.any_says("drop"):
            raise StepDropped
        self._trainer.may_drop = False

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_training_stop |= self.is_asked

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_training_stop |= self.is_asked

    def _note(self, number: int, frame: Any) -> None:
        is_shared, now = self._trainer.shared.are_shared, time.monotonic()
        if is_shared and now - self._noted_at < ONE_WISH_SECONDS:
            return
        self._signals, self._noted_at = self._signals + 1, now
        self.caught = signal.Signals(number)
        is_first, drops = self._signals == 1, self._signals == 2 and self._trainer.may_drop
        if is_first or drops:
            self._to_say.put(Stopping(NAMES[self.caught], drops))
        if drops and is_shared:
            self._trainer.drops_step = True
        elif drops:
            raise StepDropped
        if self._signals > 2:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    def _say(self) -> None:
        while (event := self._to_say.get()) is not None:
            self._listen(event)

    @contextmanager
    def catching_signals(self) -> Iterator[None]:
        """Within it signals are caught; on the main thread alone, where Python delivers them."""
        speaker = threading.Thread(target=self._say, name="stopping", daemon=True)
        speaker.start()
        before = {number: signal.signal(number, self._note) for number in NAMES}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self._to_say.put(None)
            speaker.join()
