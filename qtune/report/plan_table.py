"""A plan as a person reads it: in three lines before a run, or whole: what stands where at the peak, which techniques
make it fit, what they cost."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from qtune.recipe.schema import Recipe
from qtune.report.tables import add_notes, data_table, grid, plan_table, sample_panel
from qtune.report.wording import format_duration, one_line
from qtune.units import counted, format_bytes, format_count, format_percent

BAR_CELLS = 24
ORDER = (
    "base",
    "sharded layers",
    "streamed layers",
    "embedding",
    "head",
    "adapter",
    "gradients",
    "optimizer",
    "paged optimizer",
    "matmul workspaces",
    "checkpoints",
    "kept attention",
    "layer workspace",
    "dequantised weights",
    "loss",
    "batch",
    "slack",
    "context",
)
BOUNDS = {"card": "the card", "host": "host memory", "both": "the card or host memory", None: "nothing here"}


def show(console: Console, recipe: Recipe, data: dict[str, Any], plan: dict[str, Any], with_row: bool = False) -> None:
    """What will be trained on, and how, before it starts: in brief, or whole where the plan does not fit."""
    if not plan["fits"]:
        console.print(data_table(data), whole_plan(plan), sep="\n")
        return
    console.print(brief(recipe.name, recipe.model.base, data, plan))
    if with_row and data["sample"]:
        console.print(sample_panel(data["sample"]))


def brief(name: str, base: str, data: dict[str, Any], plan: dict[str, Any]) -> RenderableType:
    """Three lines, and one more for each thing to know of the rows; for a `plan` that fits."""
    table = grid(2)
    table.add_row(Text(one_line(name), "bold"), Text(_model(base, plan)))
    table.add_row(Text("data", "bold"), Text(_rows(data)))
    add_notes(table, data)
    table.add_row(Text("plan", "bold"), in_a_line(plan))
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


def forecast_table(plan: dict[str, Any]) -> RenderableType:
    """The forecast of plan.json: parts on the device and the host, rungs, time and disk."""
    return Group(Text(), _verdict(plan), Text(), _parts(plan), Text(), _rungs(plan), Text(), _costs(plan))


def whole_plan(plan: dict[str, Any]) -> RenderableType:
    """All of plan.json: every choice with its reason, and the forecast."""
    return Group(plan_table(plan), forecast_table(plan))


def in_a_line(plan: dict[str, Any]) -> Text:
    """`fits   4.9 GiB of 11.1 GiB on RTX 3060 · recompute 22 of 36 layers · 282 steps, about 41 min · ...`."""
    steps = "steps not known yet" if plan["is_assumed"] else counted(plan["steps"], "step")
    seconds = plan["speed"]["total_seconds"]
    time = "" if seconds is None or plan["is_assumed"] else f", about {format_duration(seconds)}"
    facts = [steps + time, f"{format_bytes(plan['disk_bytes'])} of disk"]
    return in_short(plan).append("".join(f" · {fact}" for fact in facts), "default")


def in_short(plan: dict[str, Any]) -> Text:
    """`fits   4.9 GiB of 11.1 GiB on RTX 3060 · recompute 22 of 36 layers`."""
    techniques = [one_line(rung["name"]) for rung in plan["rungs"] if rung["is_on"]]
    return _verdict(plan).append("".join(f" · {technique}" for technique in techniques), "default")


def _verdict(plan: dict[str, Any]) -> Text:
    """`fits   5.8 GiB of 6.0 GiB on RTX 2060, 0.2 GiB to spare; 1.7 GiB of host memory`."""
    needed, budget = _sum(plan["forecast"]["device"]), plan["budget"]["device_bytes"]
    host, host_budget = _sum(plan["forecast"]["host"]), plan["budget"]["host_bytes"]
    word = Text("fits", "bold green") if plan["fits"] else Text("does not fit", "bold red")
    left = f", {format_bytes(budget - needed)} to spare" if plan["fits"] else ""
    return word.append(
        f"   {format_bytes(needed)} of {format_bytes(budget)} on {one_line(plan['device']['label'])}{left};"
        f" {format_bytes(host)} of {format_bytes(host_budget)} host memory",
        "default",
    )


def _parts(plan: dict[str, Any]) -> RenderableType:
    """One row a part, the largest filling the bar; the peak's phase in the heading."""
    device, host = plan["forecast"]["device"], plan["forecast"]["host"]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(f"at the peak, in the {_phase(plan['forecast']['peak_phase'])}")
    table.add_column("device", justify="right")
    table.add_column("", no_wrap=True)
    table.add_column("host", justify="right")
    largest = max(device.values(), default=1)
    names = [name for name in ORDER if name in device or name in host]
    for name in [*names, *(name for name in (device | host) if name not in ORDER)]:
        size = device.get(name, 0)
        table.add_row(
            name,
            format_bytes(size) if size else "",
            Text("█" * round(BAR_CELLS * size / largest), "cyan"),
            format_bytes(host[name]) if name in host else "",
        )
    table.add_row(Text("in all", "bold"), format_bytes(_sum(device)), "", format_bytes(_sum(host)) if host else "")
    return table


def _phase(name: str) -> str:
    """`backward pass of the last layers` for `backward last`."""
    names = {
        "forward": "forward pass",
        "loss": "loss",
        "backward last": "backward pass of the last layers",
        "backward first": "backward pass of the first layer",
        "step": "optimizer step",
        "exchange": "sum of the gradients of all cards",
    }
    return names.get(name, name)


def _rungs(plan: dict[str, Any]) -> RenderableType:
    """The ladder: what is on and what it does here, what is left and what it would do."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("technique")
    table.add_column("frees", justify="right")
    table.add_column("host", justify="right")
    table.add_column("time", justify="right")
    table.add_column("", overflow="fold")
    for rung in plan["rungs"]:
        style = "" if rung["is_on"] else "dim"
        refused = rung["note"].startswith("refused")
        figures = ("", "", "") if refused else _figures(rung)
        table.add_row(
            Text(f"{'●' if rung['is_on'] else '○'} {rung['name']}", style),
            *(Text(figure, style) for figure in figures),
            Text(one_line(rung["note"]), "dim"),
        )
    return table


def _figures(rung: dict[str, Any]) -> tuple[str, str, str]:
    """Empty where nobody asked what it would do."""
    freed, host, cost = rung["saved_bytes"], rung["host_bytes"], rung["cost_fraction"]
    return (
        "" if freed is None else format_bytes(freed) if freed > 0 else "nothing",
        f"+{format_bytes(host)}" if host and host > 0 else "",
        f"+{format_percent(cost)}" if cost else "",
    )


def _costs(plan: dict[str, Any]) -> RenderableType:
    """Time and disk. Times are estimates of arithmetic; the techniques' shares are not measured on a card yet."""
    speed = plan["speed"]
    added = f"; the techniques add about {format_percent(speed['overhead_fraction'])}"
    if speed["tokens_per_second"] is None:
        time = "not known for a card that is not here"
    else:
        step = format_duration(speed["step_seconds"])
        time = f"about {format_count(speed['tokens_per_second'])} tokens/s, {step} a step"
        if not plan["is_assumed"]:
            time += f", {format_duration(speed['total_seconds'])} for {counted(plan['steps'], 'step')}"
    table = Table.grid(padding=(0, 3, 0, 0))
    table.add_row("batch", f"{plan['micro_batch']} x {counted(plan['gradient_accumulation'], 'sequence')} a step")
    table.add_row("time", time + added)
    kept = plan.get("cache_bytes", 0)
    cached = f"; {format_bytes(kept)} once, to keep the base in 4 bits (`qtune cache`)" if kept else ""
    table.add_row("disk", f"{format_bytes(plan['disk_bytes'])} for adapter and checkpoints{cached}")
    if plan["is_assumed"]:
        table.add_row("data", "not read: every sequence is taken to be full")
    return table


def longest_table(base: str, rows: Sequence[dict[str, Any]]) -> RenderableType:
    """The longest context by card size, and what it would be longer with more of."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("card", justify="right")
    table.add_column("tokens", justify="right")
    table.add_column("bound by")
    for row in rows:
        tokens = f"{row['tokens']:,}" if row["tokens"] else "does not fit"
        table.add_row(format_bytes(row["device_bytes"]), tokens, Text(BOUNDS[row["bound"]], "dim"))
    host = f"with {format_bytes(rows[0]['host_bytes'])} of host memory to take"
    return Group(Text(f"longest context of {one_line(base)}, forecast {host}"), Text(), table)


def cards_table(told: dict[str, Any]) -> RenderableType:
    """A row for each kind of card, and below them the step that they take together."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("cards", justify="right")
    table.add_column("packs", justify="right")
    table.add_column("each", overflow="fold")
    kinds: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for card in told["cards"]:
        device = card["plan"]["device"]
        kinds.setdefault((device["label"], device["total_bytes"]), []).append(card)
    for cards in kinds.values():
        packs = sorted({card["packs"] for card in cards})
        dealt = str(packs[0]) if len(packs) == 1 else f"{packs[0]} to {packs[-1]}"
        table.add_row(str(len(cards)), dealt, in_short(cards[0]["plan"]))
    return Group(table, Text(), _step(told))


def _step(told: dict[str, Any]) -> Text:
    """`16 packs a step over pcie4, 12 GiB a second: about 4.1 s, of which 1 % sums gradients; 282 steps, 19 min`."""
    link, packs = told["link"], counted(told["packs"], "pack")
    over = f"{packs} a step over {link['name']}, {format_bytes(link['bytes_per_second'])} a second"
    if told["step_seconds"] is None:
        return Text(f"{over}; the speed of a card that is not named is not known")
    summed = format_percent(told["sum_seconds"] / told["step_seconds"])
    step = f"{over}: about {format_duration(told['step_seconds'])}, of which {summed} sums gradients"
    if told["is_assumed"]:
        return Text(f"{step}; the data was not read, so the number of steps is not known")
    return Text(f"{step}; {counted(told['steps'], 'step')}, {format_duration(told['total_seconds'])}")


def _sum(parts: dict[str, int]) -> int:
    return sum(parts.values())
