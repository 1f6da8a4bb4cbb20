"""A run, or several, as one HTML page that holds all it needs: no script, no font, no picture from elsewhere.

Everything that comes from the run is escaped by the template engine: a row of the data may hold `<script>`. The page
forbids its own loading of anything, too (Content-Security-Policy).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from qtune import __version__
from qtune.atomic_files import write_text
from qtune.errors import UserError
from qtune.evaluate.metrics import label
from qtune.lock import Lock, PackingProbe
from qtune.report import memory_bar, run_charts, run_record, sample_answers, serving_snippets, summary, tables
from qtune.report.conclusions import conclusions_of
from qtune.report.run_record import Record
from qtune.report.wording import canaries_told, format_score, one_line, sentence, visible
from qtune.rundir import RunDir, leaves
from qtune.units import counted, format_bytes, format_count, format_percent, format_seconds

if TYPE_CHECKING:
    from qtune.report.compare_runs import Comparison

TEMPLATES = Environment(
    loader=PackageLoader("qtune.report", "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
MOST_CHARACTERS = 4000  # of one text; a sample answer may be as long as a book


def write(path: Path, text: str) -> None:
    """Raises UserError for a place where no file can be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as fault:
        raise UserError(f"{path}: cannot be written ({fault.strerror}). Name another --output.") from None


def run_page(run: RunDir) -> str:
    """The page of a run, however far it got."""
    found = run_record.read(run)
    return _rendered(
        "run.html",
        title=one_line(found.name),
        about=one_line((found.lock.recipe.get("about") if found.lock else None) or ""),
        what=_what(found),
        missing=found.missing,
        verdict=conclusions_of(found),
        figures=_figures(found),
        scores=_scores(found),
        canaries=canaries_told(found.memorised) if found.memorised else "",
        pace=summary.pace(found) if found.steps else "",
        loss=run_charts.loss(found),
        loss_rows=summary.loss_rows(found) if found.steps else (),
        watched=[
            (shortened(prompt), [(step, shortened(answer)) for step, answer in rows])
            for prompt, rows in summary.watched_rows(found)
        ],
        memory=_memory(found),
        speed=_speed(found),
        data_rows=summary.data_rows(found.data) if found.data else (),
        sample_row=[(shortened(piece), trained) for piece, trained in (found.data or {}).get("sample", ())],
        proofs=proofs(found),
        uses=serving_snippets.uses(found),
        ran_rows=_ran_rows(found),
        plan_rows=summary.plan_rows(found.plan) if found.plan else (),
        recipe=visible(found.recipe) if found.recipe else "",
    )


def comparison_page(found: "Comparison") -> str:
    """Several runs on one page."""
    return _rendered(
        "comparison.html",
        title=f"{len(found.names)} runs side by side",
        what=", ".join(found.names),
        head=("", *found.names),
        cautions=found.cautions,
        results=[(row.name, *row.values) for row in found.results],
        settings=[(row.name, *row.values) for row in found.settings],
        alike=found.alike,
        loss=run_charts.losses(found.runs),
    )


def shortened(text: str) -> str:
    """`text` with control characters made visible, cut where it is too long for a page."""
    cut = f" … {len(text) - MOST_CHARACTERS:,} characters more" if len(text) > MOST_CHARACTERS else ""
    return visible(text[:MOST_CHARACTERS]) + cut


def _rendered(template: str, **values: Any) -> str:
    return TEMPLATES.get_template(template).render(version=__version__, **values)


def _what(found: Record) -> str:
    """`LoRA rank 16 on Qwen/Qwen3-4B-Instruct, NF4`."""
    if not found.lock:
        return ""
    lora = found.lock.recipe.get("lora")
    adapter = f"LoRA of rank {lora['rank']} on " if lora else ""
    return f"{adapter}{serving_snippets.base_title(found)}{_held_in(found.lock)}"


def _held_in(lock: Lock) -> str:
    return ", held in NF4" if lock.quantization else ", not quantised"


def _figures(found: Record) -> list[tuple[str, str, str]]:
    """(name, value, note) of what one asks first."""
    figures: list[tuple[str, str, str]] = []
    for name, base, tuned in tables.main_cells(found.scores, has_intervals=False) if found.scores else ():
        rise = (found.scores or {}).get("difference")
        note = f"difference {tables.difference(rise)}" if rise and figures else "base, then tuned"
        figures.append((name, f"{base} {tables.ARROW} {tuned}", note))
    if found.memory:
        figures.append(
            (
                f"peak {memory_bar.name(found.memory)}",
                memory_bar.peak_of_total(found.memory),
                _foretold(found),
            )
        )
    if found.tokens_per_second is not None:
        took = counted(found.steps[-1].step, "step")
        took += f" in {format_seconds(found.train_seconds)}" if found.train_seconds is not None else ""
        figures.append(("speed", f"{format_count(found.tokens_per_second)} tokens/s", took))
    return figures


def _foretold(found: Record) -> str:
    """What the rehearsal said of the forecast."""
    return sentence(found.rehearsed, (), len(found.steps)) or "" if found.rehearsed else ""


def _scores(found: Record) -> dict[str, Any] | None:
    scores = found.scores
    if not scores:
        return None
    return {
        "cells": tables.score_cells(scores),
        "metric": label(scores["metric"]),
        "difference": tables.difference(scores["difference"]) if scores.get("difference") else None,
        "trained_on": _trained_on(found.data),
        "spans": [_span(who, scores[who]) for who in ("base", "tuned") if scores[who]["low"] is not None],
        "answers": [
            (each.title, each.chosen, [_sample(row) for row in each.rows]) for each in sample_answers.kept(scores)
        ],
    }


def _trained_on(data: dict[str, Any] | None) -> str:
    """Whether held-out rows were trained on, as far as the data report says."""
    if data is None or "overlap_rows" not in data:
        return ""
    if data["overlap_rows"]:
        return f"{tables.overlap_told(data['overlap_rows'])}."
    return "None of them is among the rows that were trained on."


def _span(who: str, figures: Mapping[str, float]) -> dict[str, Any]:
    """A mean and its interval between 0 and 1, in percent of a line."""
    low, high, middle = (round(100 * figures[key], 2) for key in ("low", "high", "score"))
    return {"who": who, "low": low, "width": round(high - low, 2), "middle": middle}


def _sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    told = [
        {"who": who, "score": format_score(sample[f"{who}_score"]), "text": shortened(sample[who])}
        for who in ("base", "tuned")
    ]
    return {
        "prompt": shortened(sample["prompt"]),
        "reference": shortened(sample["reference"]),
        "place": one_line(sample.get("place", "")),
        "answers": told,
    }


def _memory(found: Record) -> dict[str, Any] | None:
    if found.memory is None:
        return None
    forecast, foretold = found.forecast_bytes, _foretold(found)
    told = f"Peak {memory_bar.peak_of_total(found.memory)}"
    told += f", forecast {format_bytes(forecast)}." if forecast is not None else "."
    told += f" Rehearsed before the first step: {foretold}." if foretold else ""
    return {"title": memory_bar.heading(found.memory), "told": told, "chart": run_charts.memory(found)}


def _speed(found: Record) -> dict[str, Any] | None:
    drawn = run_charts.speed(found)
    if drawn is None:
        return None
    seconds = sum(step.step_seconds for step in found.steps)
    tokens = sum(step.tokens for step in found.steps)
    waited = sum(step.wait_seconds for step in found.steps)
    trained = sum(step.trained_tokens for step in found.steps)
    pace, of_them = (format_count(count / seconds) for count in (tokens, trained))
    told = f"{pace} tokens a second over the run, {of_them} of them trained; {format_seconds(waited)} waiting for data."
    return {"told": told, "chart": drawn}


def _ran_rows(found: Record) -> list[tuple[str, str]]:
    """Hashes and versions: what would have to be the same for the same run."""
    lock = found.lock
    if not lock:
        return []
    hashes = (("data", lock.data_sha256), ("chat template", lock.template_sha256), ("tokenizer", lock.tokenizer_sha256))
    return [
        ("base", serving_snippets.base_title(found)),
        ("base weights", f"SHA-256 {lock.base.sha256}"),
        *([("started from", start)] if (start := serving_snippets.started_from(found)) else []),
        *((name, f"SHA-256 {sha256}") for name, sha256 in hashes if sha256),
        *_probe_rows(lock.packing_probe),
        ("seed", str(lock.seed)),
        ("versions", summary.versions(lock)),
        ("run folder", found.run.path.resolve().name),
    ]


def _probe_rows(probe: PackingProbe | None) -> list[tuple[str, str]]:
    """What the probe before the first step found of documents in a pack; nothing where none was made."""
    if probe is None:
        return []
    by = f"its logits move by {format_percent(probe.moved_in_pack)} of their spread"
    if not probe.leaks:
        return [("packs", f"a document is the same alone and behind others: {by}")]
    return [("packs", f"a document would be another behind others ({by}), so each had a pass of its own")]


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
