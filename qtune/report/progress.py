"""What is known of a run so far, built from its events; the dashboard and the plain lines both show it."""

import math
from collections import deque
from dataclasses import dataclass, field

from qtune.events import (
    Evaluated,
    Event,
    Finished,
    MemoryMeasured,
    Notice,
    Saved,
    Scored,
    Started,
    StepDone,
)
from qtune.units import format_bytes, format_percent, format_seconds

RECENT_STEPS, SHOWN_EVENTS, TREND_STEPS = 20, 6, 40


@dataclass
class Progress:
    """A run as seen from its events."""

    name: str
    steps: int
    losses: list[tuple[float, float]] = field(default_factory=list)
    held_out: list[tuple[float, float]] = field(default_factory=list)
    last: StepDone | None = None
    memory: MemoryMeasured | None = None
    recent: deque[StepDone] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))
    said: deque[str] = field(default_factory=lambda: deque(maxlen=SHOWN_EVENTS))

    def add(self, event: Event) -> None:
        match event:
            case Started():
                self.steps = event.steps
            case StepDone():
                self.last = event
                self.recent.append(event)
                self.losses.append((event.step, event.loss))
            case Evaluated():
                self.held_out.append((event.step, event.loss))
            case MemoryMeasured():
                self.memory = event
            case _:
                pass
        sentence = self.sentence(event)
        if sentence:
            self.said.append(sentence)

    def sentence(self, event: Event) -> str | None:
        """The event in plain words; None for those that are shown as figures."""
        match event:
            case Notice():
                return event.text
            case Saved():
                return f"{event.what} saved ({format_bytes(event.bytes)}, {event.save_seconds:.1f} s)"
            case Evaluated():
                before = f"{self.held_out[-2][1]:.3f} -> " if len(self.held_out) > 1 else ""
                best = ", best so far" if event.is_best else ""
                return f"step {event.step}: held-out loss {before}{event.loss:.3f}{best}"
            case Scored():
                loss = "" if event.loss is None else f"held-out loss {event.loss:.3f}"
                score = "" if event.score is None else f"{event.metric} {event.score:.2f} on {event.rows} rows"
                return f"{event.who}: {', '.join(part for part in (loss, score) if part)}"
            case Finished():
                return f"{event.steps} steps done in {format_seconds(event.train_seconds)}"
            case _:
                return None

    @property
    def step(self) -> int:
        return self.last.step if self.last else 0

    @property
    def tokens_per_second(self) -> float:
        """Over the last steps, padding never counted."""
        seconds = sum(step.step_seconds for step in self.recent)
        return sum(step.tokens for step in self.recent) / seconds if seconds > 0 else 0.0

    @property
    def waiting_fraction(self) -> float:
        """Share of the last steps spent waiting for data."""
        seconds = sum(step.step_seconds for step in self.recent)
        return sum(step.wait_seconds for step in self.recent) / seconds if seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        if not self.recent or self.last is None:
            return None
        spanned = self.last.step - self.recent[0].step + 1
        logged = sum(step.step_seconds for step in self.recent)
        strides = len(self.recent)
        per_step = logged / max(spanned, strides)
        return max(0, self.steps - self.last.step) * per_step

    @property
    def best_held_out(self) -> float | None:
        losses = [loss for _, loss in self.held_out if math.isfinite(loss)]
        return min(losses, default=None)

    @property
    def trend(self) -> str:
        """Words when the loss goes the wrong way: the mean of the last steps above that of those before."""
        if len(self.losses) < 2 * TREND_STEPS:
            return ""
        values = [loss for _, loss in self.losses[-2 * TREND_STEPS :]]
        before, now = sum(values[:TREND_STEPS]), sum(values[TREND_STEPS:])
        return f"rising for {TREND_STEPS} steps" if now > 1.02 * before else ""

    @property
    def waiting(self) -> str:
        return f"waiting for data {format_percent(self.waiting_fraction)}" if self.waiting_fraction >= 0.01 else ""
