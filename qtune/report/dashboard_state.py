"""What the dashboard knows: a frozen view of the run, and the pure step from one event to the next."""

import math
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from qtune.events import Evaluated, Event, Finished, MemoryMeasured, RanksStanding, Started, StepDone, Stopping
from qtune.report.wording import best_held_out, sentence

PACE_EVENTS = 20
MOST_POINTS = 1024
MOST_MESSAGES = 12
TRAINING_PHASES = ("step", "attach")
LONGEST_FORECAST_SECONDS = 365 * 86_400

Point = tuple[float, float]


@dataclass(frozen=True)
class View:
    """The run so far. `losses` are (step, nats per token), thinned in long runs; `messages` are (step, sentence).
    It began at `began_at`, in this process, and changed at `changed_at`; `stopping` is what a signal made of it."""

    title: str
    steps: int
    losses: tuple[Point, ...] = ()
    held_out: tuple[Evaluated, ...] = ()
    recent: tuple[StepDone, ...] = ()
    memory: MemoryMeasured | None = None
    ranks: RanksStanding | None = None
    eval_seconds: float = 0.0
    messages: tuple[tuple[int, str], ...] = ()
    finished: Finished | None = None
    began_at: datetime | None = None
    changed_at: datetime | None = None
    stopping: str | None = None

    @property
    def last(self) -> StepDone | None:
        return self.recent[-1] if self.recent else None

    @property
    def step(self) -> int:
        return self.finished.steps if self.finished else self.last.step if self.last else 0

    @property
    def best(self) -> Evaluated | None:
        return best_held_out(self.held_out)

    @property
    def tokens_per_second(self) -> float | None:
        """Over the last events; None before there is a step that took time."""
        window = self._pace()
        seconds = sum(done.step_seconds for done in window)
        return sum(done.tokens for done in window) / seconds if seconds > 0 else None

    @property
    def wait_fraction(self) -> float:
        """Share of the last steps that the device stood waiting for data."""
        window = self._pace()
        seconds = sum(done.step_seconds for done in window)
        return sum(done.wait_seconds for done in window) / seconds if seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """The steps to go at the pace of the last ones, with held-out losses as often as so far."""
        window = self._pace()
        if self.finished or not window or self.step < 1:
            return None
        # One event may stand for several steps (train.log_every), so steps are counted, not events.
        since = self.recent[0].step if len(self.recent) > 1 else 0
        seconds_a_step = sum(done.step_seconds for done in window) / max(1, window[-1].step - since)
        left = max(0, self.steps - self.step) * (seconds_a_step + self.eval_seconds / self.step)
        return left if 0 <= left <= LONGEST_FORECAST_SECONDS else None

    @property
    def done_at(self) -> datetime | None:
        """When the last step should be done."""
        left = self.seconds_left
        return None if left is None or self.changed_at is None else self.changed_at + timedelta(seconds=left)

    @property
    def held_out_rises(self) -> int:
        """How many held-out losses in a row, up to the last, were above the one before."""
        losses = [each.loss for each in self.held_out]
        rises = 0
        for earlier, later in zip(reversed(losses[:-1]), reversed(losses[1:]), strict=True):
            if not later > earlier:
                break
            rises += 1
        return rises

    def _pace(self) -> tuple[StepDone, ...]:
        """The last events, less the first of the window, which only marks where it begins."""
        window = self.recent[1:] or self.recent
        return tuple(done for done in window if math.isfinite(done.step_seconds) and math.isfinite(done.wait_seconds))


def advance(view: View, event: Event, now: datetime) -> View:
    """The view after `event`, which came at `now`."""
    match event:
        case Started():
            view = replace(view, steps=event.steps)
        case StepDone():
            return replace(
                view,
                losses=with_point(view.losses, (float(event.step), event.loss)),
                recent=(*view.recent, event)[-(PACE_EVENTS + 1) :],
                changed_at=now,
            )
        case MemoryMeasured():
            is_higher = view.memory is None or event.peak_bytes >= view.memory.peak_bytes
            return replace(view, memory=event) if event.phase in TRAINING_PHASES and is_higher else view
        case RanksStanding():
            return replace(view, ranks=event)
    text = sentence(event, view.held_out, view.steps)
    step = event.step if isinstance(event, Evaluated) else view.step
    if text is not None:
        view = replace(view, messages=(*view.messages, (step, text))[-MOST_MESSAGES:], changed_at=now)
    if isinstance(event, Evaluated):
        seconds = event.eval_seconds if event.step > 0 and math.isfinite(event.eval_seconds) else 0.0
        return replace(view, held_out=(*view.held_out, event), eval_seconds=view.eval_seconds + seconds)
    if isinstance(event, Stopping):
        return replace(view, stopping=text)
    return replace(view, finished=event, stopping=None) if isinstance(event, Finished) else view


def with_point(points: tuple[Point, ...], point: Point) -> tuple[Point, ...]:
    """`points` and one more, unless it is no number; past `MOST_POINTS` neighbours are averaged, two into one."""
    if not math.isfinite(point[1]):
        return points
    if len(points) >= MOST_POINTS:
        pairs = zip(points[::2], points[1::2], strict=True)
        points = tuple(((a[0] + b[0]) / 2, (a[1] + b[1]) / 2) for a, b in pairs)
    return (*points, point)
