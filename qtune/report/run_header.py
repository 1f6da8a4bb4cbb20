"""What a run is, before it begins, in three lines: which model, on which rows, in how much memory and time."""

from typing import Any

from rich.console import Console, RenderableType
from rich.text import Text

from qtune.recipe.schema import Recipe
from qtune.report import plan_table, tables
from qtune.report.wording import one_line
from qtune.units import counted, format_count


def show(console: Console, recipe: Recipe, data: dict[str, Any], plan: dict[str, Any], with_row: bool = False) -> None:
    """What will be trained on, and how, before it starts: in brief, or whole where the plan does not fit."""
    if not plan["fits"]:
        console.print(tables.data_table(data), plan_table.whole_plan(plan), sep="\n")
        return
    console.print(brief(recipe.name, recipe.model.base, data, plan))
    if with_row and data["sample"]:
        console.print(tables.sample_panel(data["sample"]))


def brief(name: str, base: str, data: dict[str, Any], plan: dict[str, Any]) -> RenderableType:
    """Three lines, and one more for each thing to know of the rows; for a `plan` that fits."""
    table = tables.grid(2)
    table.add_row(Text(one_line(name), "bold"), Text(_model(base, plan)))
    table.add_row(Text("data", "bold"), Text(_rows(data)))
    tables.add_notes(table, data)
    table.add_row(Text("plan", "bold"), plan_table.in_a_line(plan))
    return table


def _model(base: str, plan: dict[str, Any]) -> str:
    """`Qwen/Qwen3-4B-Instruct · NF4 · LoRA, rank 16, scale 2, 33.0M weights (0.8 %) in float32`."""
    settled = {choice["name"]: choice["value"] for choice in plan["choices"]}
    return " · ".join(one_line(text) for text in (base, settled["base"], settled["adapter"]))


def _rows(data: dict[str, Any]) -> str:
    """`3,000 rows · 412k tokens, 287k trained · longest 1,911 · 14 cut · 2 dropped`."""
    facts = [
        f"{counted(data['train_rows'], 'row')}, {data['held_out_rows']:,} held out",
        f"{format_count(data['tokens'])} tokens, {format_count(data['trained_tokens'])} trained",
        f"longest {data['longest_row_tokens']:,}",
    ]
    dropped = sum(each["rows"] for each in data["dropped"])
    facts += [f"{count:,} {what}" for count, what in ((data["truncated_rows"], "cut"), (dropped, "dropped")) if count]
    return " · ".join(facts)
