"""A run folder read again: as a Markdown page, as tables, as JSON. A run that ended early is shown as far as it got."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from qtune.events import Evaluated, Finished, MemoryMeasured, StepDone
from qtune.report import curve, tables
from qtune.rundir import RunDir, read_json, write_text
from qtune.units import format_bytes, format_seconds

LOSS_ROWS, CURVE_COLUMNS, CURVE_ROWS = 12, 76, 12


@dataclasses.dataclass(frozen=True)
class Story:
    """The events of a run, sorted by kind."""

    steps: tuple[StepDone, ...]
    held_out: tuple[Evaluated, ...]
    memory: MemoryMeasured | None
    train_seconds: float | None

    @classmethod
    def read(cls, run: RunDir) -> "Story":
        events = list(run.events())
        memory = [event for event in events if isinstance(event, MemoryMeasured)]
        finished = [event.train_seconds for event in events if isinstance(event, Finished)]
        return cls(
            tuple(event for event in events if isinstance(event, StepDone)),
            tuple(event for event in events if isinstance(event, Evaluated)),
            max(memory, key=lambda event: event.peak_bytes, default=None),
            finished[-1] if finished else None,
        )

    @property
    def tokens_per_second(self) -> float:
        seconds = sum(step.step_seconds for step in self.steps)
        return sum(step.tokens for step in self.steps) / seconds if seconds else 0.0


def as_json(run: RunDir) -> dict[str, Any]:
    """Everything the run folder says, for programs; what is missing is None."""
    story = Story.read(run)
    return {
        "run": str(run.path),
        "adapter": str(run.adapter) if run.adapter.is_dir() else None,
        "steps": len(story.steps) and story.steps[-1].step,
        "loss": story.steps[-1].loss if story.steps else None,
        "train_seconds": story.train_seconds,
        "tokens_per_second": story.tokens_per_second,
        "memory": dataclasses.asdict(story.memory) if story.memory else None,
        **{path.stem: _if_there(path, read_json) for path in (run.data, run.plan, run.lock, run.scores, run.merge)},
    }


def _if_there(path: Any, read: Callable[[Any], Any]) -> Any:
    return read(path) if path.is_file() else None


def report(run: RunDir) -> RenderableType:
    """The run again, as tables."""
    story, parts = Story.read(run), []
    for path, show in ((run.data, tables.data_table), (run.plan, tables.plan_table)):
        parts.append(show(read_json(path)) if path.is_file() else _missing(path.name))
    if story.steps:
        losses = [(step.step, step.loss) for step in story.steps]
        marked = [(event.step, event.loss) for event in story.held_out]
        parts += [Text(f"\nloss {losses[-1][1]:.4f}   ◆ held-out", style="bold")]
        parts += curve.draw(losses, marked, losses[-1][0], CURVE_COLUMNS, CURVE_ROWS)
        parts.append(Text(_pace(story)))
    if story.memory:
        parts += [Text("\nmemory at the peak", style="bold"), tables.memory_table(story.memory)]
    parts.append(tables.score_table(read_json(run.scores)) if run.scores.is_file() else _missing(run.scores.name))
    if run.merge.is_file():
        merged = read_json(run.merge)
        parts.append(tables.merge_table(merged, merged["verdict"]) if merged["verdict"] else _missing("a verdict"))
    return Group(*parts)


def _missing(name: str) -> Text:
    return Text(f"\n{name} is missing: the run did not get that far.", style="yellow")


def _pace(story: Story) -> str:
    seconds = f" in {format_seconds(story.train_seconds)}" if story.train_seconds is not None else ", not finished"
    return f"{story.steps[-1].step:,} steps{seconds}, {story.tokens_per_second:,.0f} tokens a second"


def write_summary(run: RunDir) -> None:
    """summary.md: what was asked, what was learned, what it took."""
    story, lock = Story.read(run), read_json(run.lock)
    lines = [f"# {lock['name']}", ""]
    about = lock["recipe"]["about"]
    lines += [about, ""] if about else []
    lines += [f"Base `{lock['base']['name']}`, weights SHA-256 `{lock['base']['sha256'][:16]}`.", ""]
    lines += _scores(run) + _losses(story) + _memory(story) + _plan(run) + _versions(lock)
    write_text(run.summary, "\n".join(lines).rstrip() + "\n")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    escaped = [[cell.replace("|", "\\|").replace("\n", "<br>") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in [list(head), ["---"] * len(head), *escaped]] + [""]


def _scores(run: RunDir) -> list[str]:
    if not run.scores.is_file():
        return ["Not scored: the run was stopped, or kept no held-out rows.", ""]
    scores = read_json(run.scores)
    rows = [("held-out loss", *(f"{scores[who]['held_out_loss']:.4f}" for who in ("base", "tuned")))]
    if scores["tuned"]["score"] is not None:
        rows.append((f"{scores['metric']}, {scores['rows']} rows", *map(tables.score_text, _both(scores))))
    samples = [(s["prompt"], s["reference"], s["base"], s["tuned"]) for s in scores["samples"]]
    head = ["## Before and after", "", *_table(("", "base", "tuned"), rows)]
    return head + (_table(("prompt", "reference", "base", "tuned"), samples) if samples else [])


def _both(scores: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    return scores["base"], scores["tuned"]


def _losses(story: Story) -> list[str]:
    if not story.steps:
        return []
    held_out = {event.step: f"{event.loss:.4f}" for event in story.held_out}
    stride = max(1, len(story.steps) // LOSS_ROWS)
    shown = [step for i, step in enumerate(story.steps) if i % stride == 0 or step.step in held_out]
    rows = [(f"{s.step:,}", f"{s.loss:.4f}", held_out.get(s.step, ""), f"{s.learning_rate:.2e}") for s in shown]
    return ["## Loss", "", *_table(("step", "loss", "held-out", "learning rate"), rows), _pace(story) + ".", ""]


def _memory(story: Story) -> list[str]:
    if story.memory is None:
        return []
    rows = [(name, format_bytes(size)) for name, size in story.memory.parts]
    rows.append(("**peak**", f"{format_bytes(story.memory.peak_bytes)} of {format_bytes(story.memory.total_bytes)}"))
    return ["## Memory at the peak", "", *_table(("part", "held"), rows)]


def _plan(run: RunDir) -> list[str]:
    choices = read_json(run.plan)["choices"]
    rows = [(choice["name"], choice["value"], choice["reason"]) for choice in choices]
    return ["## Plan", "", *_table(("choice", "value", "why"), rows)]


def _versions(lock: dict[str, Any]) -> list[str]:
    return ["## Versions", "", ", ".join(f"{name} {version}" for name, version in lock["versions"].items()) + "."]
