"""A run folder, read once: its files and its events, sorted by kind. What is not there is named, not an error."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtune.errors import RunFolderError
from qtune.events import Answered, Evaluated, Event, Finished, Memorised, MemoryMeasured, Notice, Rehearsed, StepDone
from qtune.lock import Lock
from qtune.report.wording import best_held_out, done_at, stopped_at
from qtune.rundir import RunDir, read_json

LICENSE = re.compile(r"^license:[ \t]*[\"']?([a-z0-9][a-z0-9.-]*)[\"']?[ \t]*$", re.MULTILINE)


@dataclass(frozen=True)
class Record:
    """What a run left behind. `memory` is the measurement at the peak of `memory_series`; `exports` are the proofs of
    what was exported, by file name; `base_license` is what the base's own card says; `missing` says in full what is not
    there."""

    run: RunDir
    recipe: str | None
    lock: Lock | None
    data: dict[str, Any] | None
    plan: dict[str, Any] | None
    scores: dict[str, Any] | None
    merge: dict[str, Any] | None
    exports: tuple[tuple[str, dict[str, Any]], ...]
    base_license: str | None
    steps: tuple[StepDone, ...]
    held_out: tuple[Evaluated, ...]
    answered: tuple[Answered, ...]
    memory: MemoryMeasured | None
    memory_series: tuple[MemoryMeasured, ...]
    rehearsed: Rehearsed | None
    memorised: Memorised | None
    notices: tuple[str, ...]
    finished: Finished | None
    missing: tuple[str, ...]

    @property
    def train_seconds(self) -> float | None:
        return self.finished.train_seconds if self.finished else None

    @property
    def stopped(self) -> str | None:
        """`stopped at step 7 of 15` of a run that was; None for one that took all its steps, or may be at it yet."""
        return stopped_at(self.finished, self.plan["steps"]) if self.finished and self.plan else None

    @property
    def done_early(self) -> str | None:
        """`done at step 7 of 15, with no better held-out loss in 3` of a run that train.patience ended."""
        return done_at(self.finished, self.plan["steps"]) if self.finished and self.plan else None

    @property
    def losses(self) -> list[tuple[float, float]]:
        """(step, loss) of every step whose loss is a number."""
        return [(float(done.step), done.loss) for done in self.steps if math.isfinite(done.loss)]

    @property
    def held_out_losses(self) -> list[tuple[float, float]]:
        return [(float(each.step), each.loss) for each in self.held_out if math.isfinite(each.loss)]

    @property
    def watched(self) -> dict[str, dict[int, str]]:
        """By prompt that was watched while it trained, the answers to it by step."""
        told: dict[str, dict[int, str]] = {}
        for event in self.answered:
            for prompt, answer in zip(event.prompts, event.answers, strict=True):
                told.setdefault(prompt, {})[event.step] = answer
        return told

    @property
    def best(self) -> Evaluated | None:
        return best_held_out(self.held_out)

    @property
    def tokens_per_second(self) -> float | None:
        """Over all steps; None where none was logged."""
        seconds = sum(done.step_seconds for done in self.steps)
        return sum(done.tokens for done in self.steps) / seconds if seconds > 0 else None

    @property
    def name(self) -> str:
        return self.lock.name if self.lock and self.lock.name else self.run.path.name

    @property
    def base_on_hub(self) -> str | None:
        """The hub name of the base; None for a folder and for the base inside qtune."""
        name = self.lock.base.name if self.lock else "demo"
        return None if name == "demo" or Path(name).is_absolute() else str(name)

    @property
    def forecast_bytes(self) -> int | None:
        """What the plan said the peak on the card would be; None on the CPU, where a plan counts tensors and what is
        measured is the whole process."""
        plan = self.plan or {}
        on_card = "forecast" in plan and plan["device"]["name"] != "cpu"
        return sum(plan["forecast"]["device"].values()) if on_card else None

    @property
    def has_adapter(self) -> bool:
        return self.run.adapter.is_dir()


def read(run: RunDir) -> Record:
    """Everything in `run`, however far it got."""
    missing: list[str] = []
    lock = _lock(run, missing)
    data, plan, scores = (_json(path, missing) for path in (run.data, run.plan, run.scores))
    events = _events(run, missing)
    finished = [event for event in events if isinstance(event, Finished)]
    if not finished:
        missing.append("Training did not come to its end.")
    if not run.adapter.is_dir():
        missing.append("No adapter was saved.")
    memory = [e for e in events if isinstance(e, MemoryMeasured) and not e.is_rehearsal]
    exports = ((path.name, _json(path, missing)) for path in sorted(run.path.glob("export*.json")))
    return Record(
        run=run,
        recipe=run.recipe.read_text(encoding="utf-8-sig", errors="replace") if run.recipe.is_file() else None,
        lock=lock,
        data=data,
        plan=plan,
        scores=scores,
        merge=_json(run.merge, missing) if run.merge.is_file() else None,  # merging is a later wish, not a lack
        exports=tuple((name, value) for name, value in exports if value),
        base_license=_license(Path(lock.base.folder)) if lock else None,
        steps=tuple(event for event in events if isinstance(event, StepDone)),
        held_out=tuple(event for event in events if isinstance(event, Evaluated)),
        answered=tuple(event for event in events if isinstance(event, Answered)),
        memory=max(memory, key=lambda event: event.peak_bytes, default=None),
        memory_series=tuple(memory),
        rehearsed=next((event for event in reversed(events) if isinstance(event, Rehearsed)), None),
        memorised=next((event for event in reversed(events) if isinstance(event, Memorised)), None),
        notices=tuple(event.text for event in events if isinstance(event, Notice)),
        finished=finished[-1] if finished else None,
        missing=tuple(missing),
    )


def _lock(run: RunDir, missing: list[str]) -> Lock | None:
    if not run.lock.is_file():
        missing.append(_not_that_far(run.lock))
        return None
    try:
        return run.read_lock()
    except RunFolderError as fault:
        missing.append(str(fault))
        return None


def _json(path: Path, missing: list[str]) -> dict[str, Any] | None:
    if not path.is_file():
        missing.append(_not_that_far(path))
        return None
    try:
        value = read_json(path)
    except RunFolderError as fault:
        missing.append(str(fault))
        return None
    return value if isinstance(value, dict) else None


def _not_that_far(path: Path) -> str:
    return f"{path.name} is missing: the run did not get that far."


def _license(base: Path) -> str | None:
    """The licence in the header of the base's model card, as the hub names licences."""
    card = base / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    header = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    found = LICENSE.search(header[1]) if header else None
    return found[1] if found else None


def _events(run: RunDir, missing: list[str]) -> list[Event]:
    """The events up to the first line that cannot be read: a run that was killed may leave half of its last."""
    events: list[Event] = []
    try:
        for event in run.events():
            events.append(event)
    except RunFolderError as fault:
        missing.append(f"{fault} What follows is not shown.")
    return events
