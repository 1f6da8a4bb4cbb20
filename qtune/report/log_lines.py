"""Plain lines for a log file, a pipe or a dumb terminal: one line an event, made to be searched with grep."""

from datetime import datetime
from types import TracebackType
from typing import IO, Self

from qtune.events import Event, StepDone
from qtune.report.dashboard_state import View, advance
from qtune.report.memory_bar import peak_of_total
from qtune.report.progress_line import say
from qtune.report.wording import by_rank, finite, format_duration, format_loss, format_norm
from qtune.units import format_count, format_rate


class PlainLines:
    """A listener that writes to `file`, flushed line by line."""

    def __init__(self, file: IO[str], steps: int):
        self._file = file
        self._view = View("", steps)

    def __call__(self, event: Event) -> None:
        said = self._view.messages
        self._view = advance(self._view, event, datetime.now())
        if isinstance(event, StepDone):
            say(self._file, step_line(self._view))
        elif self._view.messages is not said:
            step, text = self._view.messages[-1]
            say(self._file, f"step {step}/{self._view.steps}  {text}" if step else text)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing is held back, so there is nothing to finish."""


def step_line(view: View) -> str:
    """Everything about the last step that moves: `step 120/282  loss 1.310  held-out 1.420  lr 1.8e-4  ...`."""
    last = view.last
    if last is None:
        return f"step 0/{view.steps}"
    facts = [f"step {last.step}/{view.steps}", f"loss {format_loss(last.loss)}"]
    if view.held_out:
        facts.append(f"held-out {format_loss(view.held_out[-1].loss)}")
    facts += [f"lr {finite(format_rate, last.learning_rate)}", f"grad {format_norm(last.grad_norm)}"]
    if (pace := view.tokens_per_second) is not None:
        facts.append(f"{finite(format_count, pace)} tok/s")
    if view.memory is not None:
        facts.append(f"peak {peak_of_total(view.memory)}")
    if view.ranks is not None:
        facts.append(f"ranks {', '.join(by_rank(view.ranks))}")
    if (left := view.seconds_left) is not None:
        facts.append(f"left {format_duration(left)}")
    return "  ".join(facts)
