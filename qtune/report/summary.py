"""A run folder read again: as a Markdown page, as tables, as JSON. A run that ended early is shown as far as it got."""

import dataclasses
import math
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from qtune.atomic_files import write_text
from qtune.lock import Lock
from qtune.report import (
    braille_plot,
    conclusions,
    markdown,
    memory_bar,
    run_record,
    sample_answers,
    serving_snippets,
    tables,
)
from qtune.report.run_record import Record
from qtune.report.wording import canaries_told, finite, format_loss, format_score, one_line
from qtune.rundir import RunDir
from qtune.units import format_bytes, format_count, format_percent, format_rate, format_seconds

LOSS_ROWS, CURVE_LINES = 12, 14


def as_json(run: RunDir) -> dict[str, Any]:
    """What the run folder says, for programs: None for what is missing, and for a number that is none."""
    found = run_record.read(run)
    last, best = found.steps[-1] if found.steps else None, found.best
    return {
        "run": str(run.path),
        "adapter": str(run.adapter) if found.has_adapter else None,
        "steps": last.step if last else 0,
        "done_early": found.done_early,
        "loss": last.loss if last and math.isfinite(last.loss) else None,
        "best_held_out": {"step": best.step, "loss": best.loss} if best else None,
        "train_seconds": found.train_seconds,
        "tokens_per_second": found.tokens_per_second,
        "verdict": conclusions.text(found) or None,
        "memory": dataclasses.asdict(found.memory) if found.memory else None,
        "data": found.data,
        "plan": found.plan,
        "lock": found.lock.as_json() if found.lock else None,
        "scores": found.scores,
        "watched": found.watched,
        "merge": found.merge,
        "notices": list(found.notices),
        "missing": list(found.missing),
    }


def report(run: RunDir) -> Group:
    """The run again, as tables, with its loss as a curve."""
    found = run_record.read(run)
    parts: list[RenderableType] = [*_title(found), *([Text(), *conclusions.lines(found)] if found.scores else [])]
    for table, values in ((tables.data_table, found.data), (tables.plan_table, found.plan)):
        parts += [Text(), table(values)] if values else []
    if found.steps:
        parts += [Text(), Text.assemble(("loss", "bold"), f"  {pace(found)}")]
        parts.append(tables.ToWidth(lambda width: _curve(found, width)))
    if found.memory:
        parts += [Text(), Text.assemble((memory_bar.title(found.memory), "bold"), "  ", memory_bar.peak(found.memory))]
        parts.append(tables.memory_table(found.memory))
    if found.scores:
        parts += [Text(), Text("before → after", "bold"), tables.score_table(found.scores)]
    if found.memorised:
        parts += [Text(), Text.assemble(("canaries", "bold"), f"  {canaries_told(found.memorised)}")]
    if found.merge and found.merge.get("verdict"):
        parts += [Text(), tables.merge_table(found.merge, found.merge["verdict"])]
    elif found.merge:
        parts += [Text(), Text(f"merged: {found.merge['output']}, not verified", tables.WARNING_STYLE)]
    parts += [Text(), *(Text(sentence, tables.WARNING_STYLE) for sentence in found.missing)] if found.missing else []
    if found.stopped:
        parts += [Text(), Text(found.stopped, "bold yellow"), *tables.command_lines(tables.next_commands(found))]
    return Group(*parts)


def _title(found: Record) -> list[Text]:
    if not found.lock:
        return [Text(str(found.run.path), "bold")]
    base = found.lock.base.name
    return [Text.assemble((one_line(found.name), "bold"), f"  {one_line(base)}  {found.run.path}")]


def _curve(found: Record, width: int) -> list[Text]:
    return braille_plot.draw(found.losses, found.held_out_losses, width, CURVE_LINES)


def pace(found: Record) -> str:
    """`1.191 at step 282 in 18 min 24 s, 4,133 tokens/s, best held-out 1.243 at step 252`."""
    last = found.steps[-1]
    took = f" in {format_seconds(found.train_seconds)}" if found.train_seconds is not None else ""
    facts = [f"{format_loss(last.loss)} at step {last.step:,}{took}"]
    if found.done_early:
        facts.append(found.done_early)
    if found.tokens_per_second is not None:
        facts.append(f"{format_count(found.tokens_per_second)} tokens/s")
    if found.best is not None:
        facts.append(f"best held-out {format_loss(found.best.loss)} at step {found.best.step:,}")
        if found.lock and found.lock.recipe.get("save", {}).get("result") == "best" and not found.stopped:
            facts.append("which the adapter is of")
    return ", ".join(facts)


def write_summary(run: RunDir) -> None:
    """summary.md: what was asked for, what was learned, what it took."""
    found = run_record.read(run)
    sections = (_head, _before_and_after, _loss, _watched, _answers, _data, _memory, _plan, _recipe, _versions)
    lines = [line for section in sections for line in section(found)]
    write_text(run.summary, "\n".join(lines).rstrip() + "\n")


def _head(found: Record) -> list[str]:
    lock = found.lock
    lines = [f"# {markdown.inline(found.name)}", ""]
    if lock:
        about = lock.recipe.get("about")
        lines += [markdown.inline(about), ""] if about else []
        lines += [f"Base `{lock.base.name}`, weights SHA-256 `{lock.base.sha256[:16]}`.", ""]
    if start := serving_snippets.started_from(found):
        lines += [f"It started from {markdown.inline(start)}, which is on the base in the figures below.", ""]
    if found.stopped:
        commands = "\n".join(tables.next_commands(found))
        lines += [f"{found.stopped.capitalize()}. Next:", "", *markdown.fenced(commands, "sh"), ""]
    lines += [f"{found.done_early.capitalize()} (train.patience).", ""] if found.done_early else []
    told = conclusions.text(found)
    lines += [markdown.inline(told), ""] if told else []
    for sentence in found.missing:
        lines += [f"> {markdown.inline(sentence)}", ""]
    return lines


def _before_and_after(found: Record) -> list[str]:
    rows = tables.result_rows(found)
    return ["## Before and after", "", *markdown.table(("", "base → tuned"), rows)] if rows else []


def _loss(found: Record) -> list[str]:
    if not found.steps:
        return []
    picture = markdown.fenced("\n".join(line.plain.rstrip() for line in _curve(found, tables.MOST_COLUMNS)))
    rows = markdown.table(("step", "loss", "held-out", "learning rate"), loss_rows(found))
    return ["## Loss", "", f"{pace(found)}.", "", *picture, "", *rows]


def loss_rows(found: Record) -> list[tuple[str, str, str, str]]:
    """A dozen stretches of the run: the last step of each, the mean loss over it, the last held-out loss in it."""
    rows = []
    stride = math.ceil(len(found.steps) / LOSS_ROWS)
    before = -1
    for start in range(0, len(found.steps), stride):
        part = found.steps[start : start + stride]
        end = part[-1].step
        held_out = [each.loss for each in found.held_out if before < each.step <= end]
        mean = sum(done.loss for done in part) / len(part)
        rate = finite(format_rate, part[-1].learning_rate)
        rows.append((f"{end:,}", format_loss(mean), format_loss(held_out[-1]) if held_out else "", rate))
        before = end
    return rows


def _watched(found: Record) -> list[str]:
    lines = ["## Answers while it trained", ""] if found.watched else []
    for prompt, rows in watched_rows(found):
        lines += [f"**Asked** {markdown.inline(prompt)}", "", *markdown.table(("step", "answer"), rows)]
    return lines


def watched_rows(found: Record) -> list[tuple[str, list[tuple[str, str]]]]:
    """By prompt that was watched, step and answer on a line: of many steps a dozen, the last among them."""
    told = []
    for prompt, answers in found.watched.items():
        steps = sorted(answers, reverse=True)[:: math.ceil(len(answers) / LOSS_ROWS)][::-1]
        told.append((one_line(prompt), [(f"{step:,}", one_line(answers[step])) for step in steps]))
    return told


def _answers(found: Record) -> list[str]:
    lines: list[str] = []
    for each in sample_answers.kept(found.scores) if found.scores else ():
        lines += [f"## {each.title}", "", each.chosen, ""]
        lines += [line for row in each.rows for line in _answer(row)]
    return lines


def _answer(row: dict[str, Any]) -> list[str]:
    fenced, place = markdown.fenced, row.get("place")
    lines = ["**Asked**" + (f", {markdown.inline(place)}" if place else ""), "", *fenced(row["prompt"]), ""]
    lines += ["**Wanted**", "", *fenced(row["reference"]), ""]
    for who in ("base", "tuned"):
        lines += [f"**{who.capitalize()}**, {format_score(row[f'{who}_score'])}", "", *fenced(row[who]), ""]
    return lines


def _data(found: Record) -> list[str]:
    return ["## Data", "", *markdown.table(("", ""), data_rows(found.data))] if found.data else []


def data_rows(data: dict[str, Any]) -> list[tuple[str, str]]:
    """data.json by name and value, what was left out last."""
    return [
        ("source", f"{serving_snippets.folder_name(data['source'])} ({data['format']})"),
        ("rows", f"{data['rows_read']:,} read, {data['train_rows']:,} to train on, {data['held_out_rows']:,} held out"),
        *tables.source_rows(data),
        *tables.canary_rows(data),
        ("tokens", f"{data['tokens']:,}, of which {data['trained_tokens']:,} trained"),
        ("longest row", f"{data['longest_row_tokens']:,} tokens"),
        ("sequences", f"{data['packs']:,}, {format_percent(data['pack_fill_fraction'])} full"),
        *(
            ("note", sentence)
            for sentence in (*tables.data_warnings(data), *tables.data_notices(data), *data["notices"])
        ),
    ]


def _memory(found: Record) -> list[str]:
    memory = found.memory
    if memory is None:
        return []
    rows = [(name, format_bytes(size)) for name, size in memory.parts]
    rows.append(("**peak**", f"{format_bytes(memory.peak_bytes)} of {format_bytes(memory.total_bytes)}"))
    return [f"## {memory_bar.heading(memory)} at the peak", "", *markdown.table(("part", "held"), rows)]


def _plan(found: Record) -> list[str]:
    return ["## Plan", "", *markdown.table(("choice", "value", "why"), plan_rows(found.plan))] if found.plan else []


def plan_rows(plan: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Every choice with its value and its reason."""
    return [(choice["name"], choice["value"], choice["reason"]) for choice in plan["choices"]]


def _recipe(found: Record) -> list[str]:
    if found.recipe is None:
        return []
    return ["## Recipe as given", "", *markdown.fenced(found.recipe.rstrip(), "toml"), ""]


def _versions(found: Record) -> list[str]:
    if not found.lock:
        return []
    return ["## Versions", "", f"{versions(found.lock)}. Seed {found.lock.seed}."]


def versions(lock: Lock) -> str:
    """`torch 2.13.0, peft 0.21.2`."""
    return ", ".join(f"{name} {version}" for name, version in lock.versions.items())
