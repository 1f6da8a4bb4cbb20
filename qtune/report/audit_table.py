"""What a check of the data found: each finding with its places, lengths as a histogram, and the verdict."""

import dataclasses
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from qtune.audit.issues import Issue
from qtune.audit.length_stats import TokenCounts
from qtune.audit.thresholds import Checked
from qtune.data.stop_tokens import StopChain
from qtune.data.unused_columns import unused_line
from qtune.report.length_histogram import histogram
from qtune.report.tables import ARROW
from qtune.report.wording import cut_told, one_line
from qtune.units import counted, format_count, format_percent

SHOWN_PLACES = 3
LEVEL_STYLES = {"fault": "bold red", "warning": "bold yellow"}


def audit_table(checked: Checked, shows_all: bool) -> RenderableType:
    """Findings, faults first, then lengths and stops, and the verdict last, where the eye is when it is done."""
    parts: list[RenderableType] = [_finding(finding, shows_all) for finding in checked.findings]
    parts.append(_facts(checked))
    if checked.tokens is not None:
        parts.append(Padding(histogram(checked.tokens), (1, 0, 1, 0)))
    return Group(*parts, verdict_line(checked))


def audit_json(checked: Checked) -> dict[str, Any]:
    """All of it, with every place that was kept."""
    return {"outcome": checked.outcome, **dataclasses.asdict(checked)}


def verdict_line(checked: Checked) -> Text:
    """`2 faults and 1 warning in 3,000 rows.`"""
    faults = sum(finding.level == "fault" for finding in checked.findings)
    warnings = len(checked.findings) - faults
    rows = counted(sum(source.rows for source in checked.sources), "row")
    if not checked.findings:
        return Text(f"Nothing is wrong with {rows}.", "bold green")
    told = " and ".join(counted(number, noun) for number, noun in ((faults, "fault"), (warnings, "warning")) if number)
    return Text(f"{told} in {rows}.", LEVEL_STYLES["fault" if faults else "warning"])


def _finding(finding: Issue, shows_all: bool) -> RenderableType:
    shown = finding.places if shows_all else finding.places[:SHOWN_PLACES]
    level = (finding.level, LEVEL_STYLES[finding.level])
    head = Text.assemble(level, (f"[{finding.code}]", "bold"), f": {one_line(finding.sentence)}")
    lines = [Text.assemble((one_line(place.place), "bold"), f": {one_line(place.told)}") for place in shown]
    if finding.rows > len(shown) and shown:
        lines.append(Text(f"and {finding.rows - len(shown):,} more", "dim"))
    if finding.advice:
        lines.append(Text(f"{ARROW} {finding.advice}"))
    return Group(head, Padding(Group(*lines), (0, 0, 1, 2)))


def _facts(checked: Checked) -> RenderableType:
    table = Table.grid(padding=(0, 3, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for source in checked.sources:
        name = "held out" if source.is_held_out else "data"
        form = source.format or "no format"
        usable = f"{counted(source.rows, 'row')} of {one_line(source.name)} ({form}), {source.usable_rows:,} usable"
        table.add_row(Text(name, "bold"), Text(usable))
    if checked.tokens is not None:
        for name, line in _token_lines(checked.tokens):
            table.add_row(Text(name, "bold"), Text(line))
    for notice in (*checked.notices, *cut_told(checked.cut_texts, checked.pieces)):
        table.add_row(Text("note", "bold"), Text(one_line(notice)))
    if checked.unused:
        table.add_row(Text("not used", "bold"), Text(one_line(unused_line(checked.unused))))
    if checked.stops is not None:
        table.add_row(Text("an answer ends", "bold"), Text(_stops_line(checked.stops)))
    return table


def _token_lines(tokens: TokenCounts) -> list[tuple[str, str]]:
    share = format_percent(tokens.trained_tokens / max(1, tokens.tokens))
    longest = ", ".join(f"{row.tokens:,} at {one_line(row.place)}" for row in tokens.longest)
    return [
        ("tokens", f"{format_count(tokens.tokens)}, of them trained {format_count(tokens.trained_tokens)} ({share})"),
        ("a row", f"{tokens.median:,} in the middle, 95 % have up to {tokens.percentile_95:,}"),
        ("longest", longest),
    ]


def _stops_line(stops: StopChain) -> str:
    served = f"{stops.served_by}: {' '.join(stops.served)}" if stops.served_by else "no generation_config.json"
    agree = "they do not agree" if stops.doubts else "they agree"
    return f"rows: {stops.learned or 'nowhere'} · tokenizer: {stops.tokenizer_eos or 'none'} · {served} · {agree}"
