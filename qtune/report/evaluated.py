"""What `qtune eval` found, as tables."""

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qtune.report import tables
from qtune.report.words import format_loss, format_score, visible


def rows_table(found: dict[str, Any]) -> RenderableType:
    """Base and tuned as after a run, or the merged model alone."""
    return tables.score_table(found) if "tuned" in found else _merged_table(found)


def _merged_table(found: dict[str, Any]) -> RenderableType:
    figures = found["merged"]
    table = Table.grid(padding=(0, 3, 0, 0))
    table.add_row("held-out loss", Text(format_loss(figures["held_out_loss"]), "bold"))
    if figures["score"] is not None:
        table.add_row(f"{found['metric']} on {found['rows']:,} rows", Text(tables.with_interval(figures), "bold"))
    for name, value in figures["parts"].items():
        table.add_row(name, Text(format_score(value), "bold"))
    if figures["general_loss"] is not None:
        table.add_row("loss on general text", Text(format_loss(figures["general_loss"]), "bold"))
    return Group(table, *(_sample(sample) for sample in found["samples"]))


def _sample(sample: dict[str, Any]) -> RenderableType:
    asked = Table.grid(padding=(0, 3, 0, 0))
    answer = f"merged, {format_score(sample['merged_score'])}"
    for name, text in (("asked", "prompt"), ("wanted", "reference"), (answer, "merged")):
        asked.add_row(Text(name, "dim"), Text(visible(sample[text]), overflow="fold"))
    return Group(Text(), asked)


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
