"""What was measured, as Markdown: a table an item."""

from typing import Any

from qtune.units import GIB

from .lab import Figures

UNITS = {"_bytes": ", GiB", "_seconds": ", s", "_fraction": ", %", "_per_token": ", KiB a token"}


def markdown(report: Figures) -> str:
    head = "A rehearsal on the processor: these figures mean nothing." if report["is_rehearsal"] else report["card"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    settings = ", ".join(f"{name} {value}" for name, value in report["settings"].items())
    lines = [f"# {report['date']}, {head}", "", f"Python {report['python']}, {versions}.", ""]
    lines += [f"{settings}; random weights.", "", "| item | rows | seconds | expected | |", "|---|---|---|---|---|"]
    for name, item in report["items"].items():
        ended = item["ended_early"] or "whole"
        lines.append(f"| {name} | {len(item['rows'])} | {item['seconds']:.0f} | {item['expected_seconds']} | {ended} |")
    for name, item in report["items"].items():
        lines += ["", f"## {name}", ""]
        if item["ended_early"]:
            lines += [f"Ended early: {item['ended_early']}", ""]
        columns = list(dict.fromkeys(key for row in item["rows"] for key in row))
        if columns:
            lines.append("| " + " | ".join(titled(column) for column in columns) + " |")
            lines.append("|" + "---|" * len(columns))
        for row in item["rows"]:
            lines.append("| " + " | ".join(told(column, row.get(column)) for column in columns) + " |")
    return "\n".join(lines) + "\n"


def titled(column: str) -> str:
    for ending, unit in UNITS.items():
        if column.endswith(ending):
            return column.removesuffix(ending).replace("_", " ") + unit
    return column.replace("_", " ")


def told(column: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if column.endswith("_bytes"):
        return f"{value / GIB:.3f}"
    if column.endswith("_fraction"):
        return f"{100 * value:+.1f}"
    if column.endswith("_per_token"):
        return f"{value / 1024:.1f}"
    if isinstance(value, float):
        return f"{value:.3f}" if value < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("\n", " ").replace("|", "/")
