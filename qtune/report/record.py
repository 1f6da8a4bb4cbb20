"""A run folder, read once: its files and its events, sorted by kind. What is not there is named, not an error."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtune.errors import RunFolderError
from qtune.events import Evaluated, Event, Finished, MemoryMeasured, Notice, StepDone
from qtune.report.words import best_held_out
from qtune.rundir import RunDir, read_json


@dataclass(frozen=True)
class Record:
    """What a run left behind. `memory` is the measurement at its peak; `missing` says in full what is not there."""

    run: RunDir
    lock: dict[str, Any] | None
    data: dict[str, Any] | None
    plan: dict[str, Any] | None
    scores: dict[str, Any] | None
    merge: dict[str, Any] | None
    steps: tuple[StepDone, ...]
    held_out: tuple[Evaluated, ...]
    memory: MemoryMeasured | None
    notices: tuple[str, ...]
    train_seconds: float | None
    missing: tuple[str, ...]

    @property
    def losses(self) -> list[tuple[float, float]]:
        """(step, loss) of every step whose loss is a number."""
        return [(float(done.step), done.loss) for done in self.steps if math.isfinite(done.loss)]

    @property
    def held_out_losses(self) -> list[tuple[float, float]]:
        return [(float(each.step), each.loss) for each in self.held_out if math.isfinite(each.loss)]

    @property
    def best(self) -> Evaluated | None:
        return best_held_out(self.held_out)

    @property
    def tokens_per_second(self) -> float | None:
        """Over all steps; None where none was logged."""
        seconds = sum(done.step_seconds for done in self.steps)
        return sum(done.tokens for done in self.steps) / seconds if seconds > 0 else None

    @property
    def has_adapter(self) -> bool:
        return self.run.adapter.is_dir()


def read(run: RunDir) -> Record:
    """Everything in `run`, however far it got."""
    missing: list[str] = []
    lock, data, plan, scores = (_json(path, missing) for path in (run.lock, run.data, run.plan, run.scores))
    events = _events(run, missing)
    finished = [event for event in events if isinstance(event, Finished)]
    if not finished:
        missing.append("Training did not come to its end.")
    if not run.adapter.is_dir():
        missing.append("No adapter was saved.")
    memory = (e for e in events if isinstance(e, MemoryMeasured) and not e.phase.startswith("rehearsed"))
    return Record(
        run=run,
        lock=lock,
        data=data,
        plan=plan,
        scores=scores,
        merge=_json(run.merge, missing) if run.merge.is_file() else None,  # merging is a later wish, not a lack
        steps=tuple(event for event in events if isinstance(event, StepDone)),
        held_out=tuple(event for event in events if isinstance(event, Evaluated)),
        memory=max(memory, key=lambda event: event.peak_bytes, default=None),
        notices=tuple(event.text for event in events if isinstance(event, Notice)),
        train_seconds=finished[-1].train_seconds if finished else None,
        missing=tuple(missing),
    )


def _json(path: Path, missing: list[str]) -> dict[str, Any] | None:
    if not path.is_file():
        missing.append(f"{path.name} is missing: the run did not get that far.")
        return None
    try:
        value = read_json(path)
    except RunFolderError as fault:
        missing.append(str(fault))
        return None
    return value if isinstance(value, dict) else None


def _events(run: RunDir, missing: list[str]) -> list[Event]:
    """The events up to the first line that cannot be read: a run that was killed may leave half of its last."""
    events: list[Event] = []
    try:
        for event in run.events():
            events.append(event)
    except (ValueError, KeyError, TypeError):
        missing.append("metrics.jsonl or memory.jsonl breaks off in the middle of a line; what follows is not shown.")
    return events
