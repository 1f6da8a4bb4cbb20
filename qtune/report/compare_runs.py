"""Runs side by side: which settings differ, what came out, and why some of them cannot be compared."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qtune.distributed.agreement import names_rows
from qtune.errors import UserError
from qtune.evaluate.metrics import label
from qtune.lock import Lock
from qtune.report import memory_bar, run_record, serving_snippets, tables
from qtune.report.run_record import Record
from qtune.report.wording import format_loss, one_line
from qtune.rundir import RunDir, leaves
from qtune.units import counted, format_count, format_seconds

UNTOLD = "–"
# None of these changes what is learned, and where the data lies does not as long as it is the same data.
BESIDE_THE_POINT = ("name", "about", "demo.", "report.", "save.", "data.check.")


@dataclass(frozen=True)
class ComparedRow:
    """One line of the comparison: a name, and a value per run."""

    name: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """`cautions` are sentences on what cannot be compared; there are none where all can be."""

    runs: tuple[tuple[str, Record], ...]
    settings: tuple[ComparedRow, ...]
    results: tuple[ComparedRow, ...]
    cautions: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.runs)

    @property
    def alike(self) -> str:
        """What to say where no setting differs."""
        are_known = all(found.lock for _, found in self.runs)
        return "The recipes are the same." if are_known else "Not known: lock.json, which says them, cannot be read."


def compare(runs: Sequence[RunDir]) -> Comparison:
    """Raises UserError for fewer than two runs, or the same one twice."""
    paths = [run.path.resolve() for run in runs]
    if len(set(paths)) < max(2, len(paths)):
        raise UserError("report --compare: name two or more run folders, each of them once.")
    records = [run_record.read(run) for run in runs]
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        names = [str(run.path) for run in runs]
    return Comparison(
        tuple((one_line(name), found) for name, found in zip(names, records, strict=True)),
        tuple(_settings(records)),
        tuple(_results(records)),
        tuple(_cautions(names, records)),
    )


def _settings(records: Sequence[Record]) -> Iterator[ComparedRow]:
    """The fields of the recipes that are not the same in all."""
    recipes = [dict(leaves(found.lock.recipe if found.lock else {})) for found in records]
    hashes = {found.lock and found.lock.data_sha256 for found in records}
    is_same_data = len(hashes) == 1 and None not in hashes
    for field in dict.fromkeys(field for recipe in recipes for field in recipe):
        values = [recipe.get(field) for recipe in recipes]
        if field.startswith(BESIDE_THE_POINT) or (is_same_data and names_rows(field)):
            continue
        if any(value != values[0] for value in values):
            shown = tuple(_shown(value) for value in values)
            yield ComparedRow(field, shown if len(set(shown)) > 1 else tuple(one_line(str(value)) for value in values))


def _shown(value: Any) -> str:
    if value is None:
        return "unset"
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return one_line(serving_snippets.folder_name(value)) if isinstance(value, str) else str(value)


def _results(records: Sequence[Record]) -> Iterator[ComparedRow]:
    """What came out; a line that none of the runs has is left out."""
    told: dict[str, Callable[[Record], str | None]] = {
        "steps": lambda found: f"{found.steps[-1].step:,}" if found.steps else None,
        "last loss": lambda found: format_loss(found.losses[-1][1]) if found.losses else None,
        "best held-out loss": _best,
        "held-out loss at the end": lambda found: _score(found, "held_out_loss"),
        "metric": _metric,
        "base score": lambda found: tables.with_interval(found.scores["base"]) if found.scores else None,
        "tuned score": lambda found: tables.with_interval(found.scores["tuned"]) if found.scores else None,
        "difference": _difference,
        "loss on general text": _forgotten,
        "peak memory": lambda found: memory_bar.peak_of_total(found.memory) if found.memory else None,
        "tokens/s": lambda found: format_count(pace) if (pace := found.tokens_per_second) is not None else None,
        "training took": _took,
    }
    for name, tell in told.items():
        values = [tell(found) for found in records]
        if any(value is not None for value in values):
            yield ComparedRow(name, tuple(UNTOLD if value is None else value for value in values))


def _best(found: Record) -> str | None:
    return f"{format_loss(found.best.loss)} at step {found.best.step:,}" if found.best else None


def _score(found: Record, figure: str) -> str | None:
    return format_loss(found.scores["tuned"][figure]) if found.scores else None


def _metric(found: Record) -> str | None:
    if not found.scores or found.scores["metric"] == "none":
        return None
    return f"{label(found.scores['metric']).name} on {counted(found.scores['rows'], 'row')}"


def _forgotten(found: Record) -> str | None:
    base, tuned = (found.scores[who].get("general_loss") if found.scores else None for who in ("base", "tuned"))
    return None if base is None or tuned is None else f"{format_loss(base)} {tables.ARROW} {format_loss(tuned)}"


def _difference(found: Record) -> str | None:
    return tables.difference(found.scores["difference"]) if found.scores and found.scores.get("difference") else None


def _took(found: Record) -> str | None:
    return format_seconds(found.train_seconds) if found.train_seconds is not None else None


def _cautions(names: Sequence[str], records: Sequence[Record]) -> Iterator[str]:
    """A sentence for each thing that has to be the same and is not."""
    must_match: tuple[tuple[Callable[[Record], Any], str], ...] = (
        (
            _of_lock(lambda lock: lock.data_sha256),
            "trained or scored on other data, so neither losses nor scores can be compared",
        ),
        (
            _of_lock(lambda lock: lock.base.sha256),
            "started from other base weights, so neither losses nor rises can be compared",
        ),
        (_of_lock(lambda lock: lock.template_sha256), "another chat template, so a loss is not over the same tokens"),
        (_of_scores("metric"), "scored by another metric, so the scores cannot be compared"),
        (_of_scores("rows"), "scored on another number of rows, so the scores cannot be compared"),
        (_of_lock(lambda lock: lock.device), "run on another kind of device, so memory and speed cannot be compared"),
    )
    for fact, consequence in must_match:
        values = [fact(found) for found in records]
        others = [name for name, value in zip(names, values, strict=True) if value not in (None, values[0])]
        if others and values[0] is not None:
            yield f"{', '.join(map(one_line, others))}, beside {one_line(names[0])}: {consequence}."
    unfinished = [name for name, found in zip(names, records, strict=True) if found.train_seconds is None]
    if unfinished:
        yield f"Not finished: {', '.join(map(one_line, unfinished))}. What is told is how far it got."


def _of_lock(fact: Callable[[Lock], str | None]) -> Callable[[Record], Any]:
    return lambda found: fact(found.lock) if found.lock else None


def _of_scores(key: str) -> Callable[[Record], Any]:
    return lambda found: found.scores[key] if found.scores else None


def as_json(found: Comparison) -> dict[str, Any]:
    """For programs: the same words that the table has, by run."""
    return {
        "runs": [str(each.run.path) for _, each in found.runs],
        "settings": [asdict(row) for row in found.settings],
        "results": [asdict(row) for row in found.results],
        "cautions": list(found.cautions),
    }


def table(found: Comparison) -> RenderableType:
    """The runs as columns."""
    parts: list[RenderableType] = [Text(sentence, tables.WARNING_STYLE) for sentence in found.cautions]
    sections = (
        ("results", found.results, "None of them came to a result."),
        ("settings that differ", found.settings, found.alike),
    )
    for title, rows, otherwise in sections:
        grid = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
        grid.add_column(Text(title), overflow="fold")
        for name in found.names:
            grid.add_column(Text(name), overflow="fold")
        for row in rows:
            grid.add_row(Text(row.name), *(Text(value) for value in row.values))
        parts += [Text(), grid if rows else Text(otherwise)]
    return Group(*parts)
