"""What `qtune eval` found, as tables."""

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from qtune.report import sample_answers, tables
from qtune.report.wording import format_score, visible
from qtune.units import counted

SHOWN_ROWS = 3


def rows_table(found: dict[str, Any]) -> RenderableType:
    """Base and tuned as after a run; with merged models beside them a column each."""
    if not found["same_answers"]:
        return Group(*_own_rows(found), tables.score_table(found))
    names = [*tables.BOTH, *found["same_answers"]]
    table = Table("", *(Column(escape(name), overflow="fold") for name in names), box=None, padding=(0, 3, 0, 0))
    for row in tables.score_cells(found, names):
        table.add_row(*row)
    same = found["same_answers"].values()
    table.add_row("answers as tuned", "", "", *(f"{count:,} of {found['rows']:,}" for count in same))
    return Group(*_own_rows(found), table, *sample_answers.drawn(found, lambda row: _of_all(row, names)))


def _own_rows(found: dict[str, Any]) -> list[Text]:
    """What is to be known of rows that are not the run's own: how they were read, and which it was trained on."""
    if "data" not in found:
        return []
    lines = [Text(f"{found['data']}: {counted(found['rows_read'], 'row')}, read as {found['format']}", "bold")]
    dropped, trained_on = found["dropped"], found["trained_on"]
    if dropped:
        lines.append(Text(f"not used: {counted(len(dropped), 'row')}. {_first(dropped)}", tables.WARNING_STYLE))
    if trained_on is None:
        lines.append(Text("the run's training rows are not to be had, so none was looked for among them", "dim"))
    elif trained_on:
        said = f"{counted(len(trained_on), 'row')} of these had been trained on ({_first(trained_on)})"
        lines.append(Text(f"{said}, so this is not only what it makes of new ones", tables.WARNING_STYLE))
    return lines


def _first(places: Sequence[str]) -> str:
    return "; ".join(places[:SHOWN_ROWS]) + ("; ..." if len(places) > SHOWN_ROWS else "")


def _of_all(row: dict[str, Any], names: Sequence[str]) -> RenderableType:
    """A question with the answers of all models under it."""
    table = sample_answers.question(row)
    for name in names:
        told = f"{name}, {format_score(row[f'{name}_score'])}"
        table.add_row(Text(told, "dim"), Text(visible(row[name]), overflow="fold"))
    return table


def benchmark_table(found: dict[str, Any]) -> RenderableType:
    """One figure of a task a line, a model a column, with lm-eval's standard error."""
    results = found["results"]
    table = Table("task", "metric", *results, box=None, padding=(0, 3, 0, 0))
    for row in zip(*results.values(), strict=True):
        table.add_row(row[0]["task"], row[0]["metric"], *map(_figure, row))
    limit = found["limit"]
    note = (
        [Text(f"{counted(limit, 'row')} of each task at the most, so no score to publish", "yellow")] if limit else []
    )
    return Group(table, *note)


def _figure(result: dict[str, Any]) -> str:
    stderr = result["stderr"]
    return f"{result['value']:.4f}" + (f" ± {stderr:.4f}" if stderr is not None else "")
