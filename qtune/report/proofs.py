"""What shows that a thing made from the run is right: each sentence stands only where its check's result does."""

from typing import Any, NamedTuple

from qtune.report import tables
from qtune.report.run_record import Record
from qtune.report.wording import one_line
from qtune.rundir import leaves


class Proof(NamedTuple):
    """A merge or an export. `outcome` is in words; `passed` is None where it was not held against the live adapter."""

    title: str
    outcome: str
    passed: bool | None
    caption: str
    rows: list[tuple[str, str]]


def proofs(found: Record) -> list[Proof]:
    """The last merge, and every export."""
    merged = [_merge(found.merge)] if found.merge else []
    return [*merged, *(_export(name, report) for name, report in found.exports)]


def _merge(report: dict[str, Any]) -> Proof:
    verdict = report.get("verdict")
    if not verdict:
        written = f"onto the {report['onto']} base, {report['dtype']}: {report['output']}"
        caption = "Written, and not held against the live adapter"
        return Proof("Merge", "not verified", None, caption, [("merged", written)])
    caption = "The merged model, loaded again and held against the live adapter on held-out rows"
    passed = bool(verdict["passed"])
    return Proof("Merge", "passed" if passed else "failed", passed, caption, tables.merge_rows(report, verdict))


def _export(name: str, report: dict[str, Any]) -> Proof:
    """Of a report that another version wrote the plain values, by their dotted names."""
    title = f"Export {one_line(name.removeprefix('export-').removesuffix('.json'))}"
    try:
        rows = [*tables.export_rows(report), *(("", note) for note in report["notes"])]
    except (LookupError, TypeError, ValueError, AttributeError):
        return _of_another_version(title, report)
    asked = " and asked of llama.cpp beside the live adapter" if report["verdict"] else ""
    return Proof(title, *tables.export_outcome(report), f"The file, read back byte by byte{asked}", rows)


def _of_another_version(title: str, report: dict[str, Any]) -> Proof:
    values = ((name.replace("_", " "), value) for name, value in leaves(report))
    rows = [(one_line(name), one_line(str(value))) for name, value in values if isinstance(value, str | int | float)]
    passed = report.get("passed")
    outcome = {True: "passed", False: "failed"}.get(passed, "") if isinstance(passed, bool) else ""
    return Proof(title, outcome, passed if outcome else None, "As its report says", rows)
