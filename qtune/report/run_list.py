"""The runs below a folder: what each is, how far it came, what it learned, and what it takes on the disk."""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from rich.text import Text

from qtune.errors import RunFolderError
from qtune.evaluate.metrics import label
from qtune.report.tables import ARROW
from qtune.report.wording import format_loss, format_score, one_line
from qtune.rundir import RunDir, bytes_below, read_json, runs_in
from qtune.units import counted, format_bytes

State = Literal["finished", "stopped", "running", "never began"]


@dataclass(frozen=True)
class Listed:
    """One run. `steps` is how many the plan has, `without_better` how many held-out losses in a row ended it before
    them, `score` what `before` and `after` are: a metric, or held-out loss."""

    path: Path
    name: str | None
    base: str | None
    began: datetime
    state: State
    steps_done: int
    steps: int | None
    without_better: int
    score: str | None
    before: float | None
    after: float | None
    adapter_bytes: int
    checkpoint_bytes: int
    bytes: int

    @classmethod
    def of(cls, run: RunDir) -> "Listed":
        """What can be read; what cannot, of a run that broke off or that another version wrote, is None."""
        lock, steps = _values(run.lock), _dig(_values(run.plan), "steps")
        done, without_better = _last(run, "step", "step"), _last(run, "finished", "without_better")
        score, before, after = _score(_values(run.scores))
        return cls(
            run.path,
            _dig(lock, "name"),
            _dig(lock, "base", "name"),
            datetime.fromtimestamp(run.recipe.stat().st_mtime),
            _state(run, done, steps, without_better > 0),
            done,
            steps,
            without_better,
            score,
            before,
            after,
            bytes_below(run.adapter),
            bytes_below(run.checkpoints),
            bytes_below(run.path),
        )

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path), "began": self.began.isoformat(timespec="seconds")}

    @property
    def told(self) -> str:
        """`finished, 440 steps`, `finished at step 7 of 15, with no better held-out loss in 3`, `stopped at step 7 of
        15`."""
        if self.state == "never began":
            return self.state
        of = "" if self.steps is None else f" of {self.steps:,}"
        at = f"{self.state} at step {self.steps_done:,}{of}"
        if self.state == "finished" and self.without_better:
            return f"{at}, with no better held-out loss in {self.without_better:,}"
        if self.state == "finished":
            return f"finished, {counted(self.steps_done, 'step')}"
        return at


def runs_below(folder: Path) -> list[Listed]:
    """Every run in `folder` or a folder of it, the newest first; links are not followed."""
    return sorted((Listed.of(run) for run in runs_in(folder)), key=lambda run: run.began, reverse=True)


def listing(runs: Sequence[Listed]) -> list[Text]:
    """Two lines a run: where and how far, what and how good and how large."""
    return [line for run in runs for line in _lines(run)]


def _lines(run: Listed) -> tuple[Text, Text]:
    style = {"finished": "green", "running": "cyan"}.get(run.state, "yellow")
    head = Text.assemble((str(run.path), "bold"), f"  {run.began:%Y-%m-%d %H:%M}  ", (run.told, style))
    facts = [] if run.name is None else [f"{one_line(run.name)} on {one_line(str(run.base))}"]
    if run.before is not None and run.after is not None:
        form = format_loss if run.score == "held-out loss" else format_score
        told = label(run.score or "").name
        facts.append(f"{told} {form(run.before)} {ARROW} {form(run.after)}")
    sizes = [("adapter", run.adapter_bytes), ("checkpoints", run.checkpoint_bytes), ("in all", run.bytes)]
    facts.append(", ".join(f"{name} {format_bytes(size)}" for name, size in sizes if size))
    return head, Text(f"  {'   '.join(facts)}")


def _state(run: RunDir, done: int, steps: int | None, is_done_early: bool) -> State:
    if run.is_held:
        return "running"
    if not run.lock.is_file():
        return "never began"
    is_done = is_done_early or (steps is not None and done >= steps)
    return "finished" if is_done and run.adapter.is_dir() else "stopped"


def _last(run: RunDir, event: str, field: str) -> int:
    """A number of the last such event in the journal, 0 where there is none; half a line at its end, as of a killed
    run, does not count."""
    lines = run.metrics.read_text(encoding="utf-8", errors="replace").splitlines() if run.metrics.is_file() else []
    for line in reversed(lines):
        with contextlib.suppress(ValueError):
            values = json.loads(line)
            if _dig(values, "event") == event and isinstance(number := _dig(values, field), int):
                return number
    return 0


def _score(scores: Any) -> tuple[str | None, float | None, float | None]:
    """What is told of the scores, before and after: the metric where there is one."""
    for name, field in ((_dig(scores, "metric"), "score"), ("held-out loss", "held_out_loss")):
        before, after = (_dig(scores, who, field) for who in ("base", "tuned"))
        if before is not None and after is not None:
            return name, before, after
    return None, None, None


def _values(path: Path) -> Any:
    try:
        return read_json(path)
    except RunFolderError:
        return None


def _dig(values: Any, *names: str) -> Any:
    for name in names:
        values = values.get(name) if isinstance(values, dict) else None
    return values
