"""What `qtune eval` found, as tables."""

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from qtune.report import answers, tables
from qtune.report.words import format_score, visible


def rows_table(found: dict[str, Any]) -> RenderableType:
    """Base and tuned as after a run; with merged models beside them a column each."""
    if not found["same_answers"]:
        return tables.score_table(found)
    names = [*tables.BOTH, *found["same_answers"]]
    table = Table("", *(Column(escape(name), overflow="fold") for name in names), box=None, padding=(0, 3, 0, 0))
    for row in tables.score_cells(found, names):
        table.add_row(*row)
    same = found["same_answers"].values()
    table.add_row("answers as tuned", "", "", *(f"{count:,} of {found['rows']:,}" for count in same))
    return Group(table, *answers.drawn(found, lambda row: _of_all(row, names)))


def _of_all(row: dict[str, Any], names: Sequence[str]) -> RenderableType:
    """A question with the answers of all models under it."""
    table = answers.question(row)
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
    note = [Text(f"{limit:,} rows of each task at the most, so no score to publish", "yellow")] if limit else []
    return Group(table, *note)


def _figure(result: dict[str, Any]) -> str:
    stderr = result["stderr"]
    return f"{result['value']:.4f}" + (f" ± {stderr:.4f}" if stderr is not None else "")
