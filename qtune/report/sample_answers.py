"""Answers of scores.json beside their questions: samples that nobody picked, and those that scored lowest."""

from collections.abc import Callable
from typing import Any, NamedTuple

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qtune.report.wording import format_score, one_line, visible
from qtune.units import counted


class Answers(NamedTuple):
    """Questions with the answers of each model, and in a sentence how they were chosen."""

    title: str
    chosen: str
    rows: list[dict[str, Any]]


def kept(scores: dict[str, Any]) -> list[Answers]:
    """The samples and the worst answers; what a run folder does not hold is left out."""
    found = [
        Answers("Sample answers", _how_drawn(scores.get("samples_seed")), scores["samples"]),
        Answers("Where it did worst", _how_bad(scores), scores.get("worst", [])),
    ]
    return [each for each in found if each.rows]


def _how_drawn(seed: int | None) -> str:
    return "How they were chosen was not noted." if seed is None else f"Drawn with seed {seed}, not picked by hand."


def _how_bad(scores: dict[str, Any]) -> str:
    """`The lowest scores of the tuned model: 5 of the 26 rows below 1.`"""
    below, shown = sum(score < 1 for score in scores.get("tuned_scores", ())), len(scores.get("worst", ()))
    return f"The lowest scores of the tuned model: {shown:,} of the {counted(below, 'row')} below 1."


def drawn(scores: dict[str, Any], draw: Callable[[dict[str, Any]], RenderableType]) -> list[RenderableType]:
    """All that is kept, under headings; `draw` is for one question."""
    parts: list[RenderableType] = []
    for each in kept(scores):
        parts += [Text(), Text.assemble((each.title, "bold"), (f"  {each.chosen}", "dim"))]
        parts += [part for row in each.rows for part in (Text(), draw(row))]
    return parts


def question(row: dict[str, Any]) -> Table:
    """Where it stands, what was asked and what was wanted."""
    table = Table.grid(padding=(0, 3, 0, 0))
    if row.get("place"):
        table.add_row(Text("row", "dim"), Text(one_line(row["place"]), "dim"))
    table.add_row(Text("asked", "dim"), Text(visible(row["prompt"]), "bold"))
    table.add_row(Text("wanted", "dim"), Text(visible(row["reference"])))
    return table


def side_by_side(row: dict[str, Any]) -> RenderableType:
    """The answers of base and tuned in two columns under their question."""
    table = Table(box=None, expand=True, padding=(0, 2, 0, 0), header_style="dim")
    for who in ("base", "tuned"):
        table.add_column(f"{who}, {format_score(row[f'{who}_score'])}", ratio=1, overflow="fold")
    table.add_row(Text(visible(row["base"])), Text(visible(row["tuned"]), "green" if row["tuned_score"] == 1 else ""))
    return Group(question(row), table)
