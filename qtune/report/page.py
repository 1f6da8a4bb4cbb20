"""A run, or several, as one HTML page that holds all it needs: no script, no font, no picture from elsewhere.

Everything that comes from the run is escaped by the template engine: a row of the data may hold `<script>`. The page
forbids its own loading of anything, too (Content-Security-Policy).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from qtune import __version__
from qtune.errors import UserError
from qtune.report import bar, pictures, record, serving, summary, tables
from qtune.report.compare import Comparison
from qtune.report.record import Record
from qtune.report.words import canaries_told, format_score, one_line, sentence, visible
from qtune.rundir import RunDir, leaves, write_text
from qtune.units import format_bytes, format_count, format_seconds

TEMPLATES = Environment(
    loader=PackageLoader("qtune.report", "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
MOST_CHARACTERS = 4000  # of one text; a sample answer may be as long as a book


class Proof(NamedTuple):
    """What shows that a thing made from the run is right; `passed` is None where its report does not say."""

    title: str
    passed: bool | None
    caption: str
    rows: Sequence[tuple[str, str]]


def write(path: Path, text: str) -> None:
    """Raises UserError for a place where no file can be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as fault:
        raise UserError(f"{path}: cannot be written ({fault.strerror}). Name another --output.") from None


def run_page(run: RunDir) -> str:
    """The page of a run, however far it got."""
    found = record.read(run)
    return _rendered(
        "run.html",
        title=one_line(found.name),
        about=one_line((found.lock or {}).get("recipe", {}).get("about") or ""),
        what=_what(found),
        missing=found.missing,
        figures=_figures(found),
        scores=_scores(found),
        canaries=canaries_told(found.memorised) if found.memorised else "",
        pace=summary.pace(found) if found.steps else "",
        loss=pictures.loss(found),
        loss_rows=summary.loss_rows(found) if found.steps else (),
        memory=_memory(found),
        speed=_speed(found),
        data_rows=summary.data_rows(found.data) if found.data else (),
        sample_row=[(shortened(piece), trained) for piece, trained in (found.data or {}).get("sample", ())],
        proofs=_proofs(found),
        uses=serving.uses(found),
        ran_rows=_ran_rows(found),
        plan_rows=summary.plan_rows(found.plan) if found.plan else (),
        recipe=visible(found.recipe) if found.recipe else "",
    )


def comparison_page(found: Comparison) -> str:
    """Several runs on one page."""
    return _rendered(
        "comparison.html",
        title=f"{len(found.names)} runs side by side",
        what=", ".join(found.names),
        head=("", *found.names),
        cautions=found.cautions,
        results=[(row.name, *row.values) for row in found.results],
        settings=[(row.name, *row.values) for row in found.settings],
        loss=pictures.losses(found.runs),
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
    lora = found.lock["recipe"].get("lora")
    held = "held in NF4" if found.lock.get("quantization") else "not quantised"
    adapter = f"LoRA of rank {lora['rank']} on " if lora else ""
    return f"{adapter}{serving.base_title(found)}, {held}"


def _figures(found: Record) -> list[tuple[str, str, str]]:
    """(name, value, note) of what one asks first."""
    figures: list[tuple[str, str, str]] = []
    for name, base, tuned in tables.main_cells(found.scores) if found.scores else ():
        plain = [value.split(" (")[0] for value in (base, tuned)]
        rise = (found.scores or {}).get("difference")
        note = f"difference {tables.difference(rise)}" if rise and figures else "base, then tuned"
        figures.append((name, f" {tables.ARROW} ".join(plain), note))
    if found.memory:
        figures.append(
            (f"peak {bar.title(found.memory).split(' (')[0]}", bar.peak_of_total(found.memory), _foretold(found))
        )
    if found.tokens_per_second is not None:
        took = f"{found.steps[-1].step:,} steps"
        took += f" in {format_seconds(found.train_seconds)}" if found.train_seconds is not None else ""
        figures.append(("speed", f"{format_count(found.tokens_per_second)} tokens/s", took))
    return figures


def _foretold(found: Record) -> str:
    """What the rehearsal said of the forecast."""
    return sentence(found.rehearsed, ()) or "" if found.rehearsed else ""


def _scores(found: Record) -> dict[str, Any] | None:
    scores = found.scores
    if not scores:
        return None
    seed = scores.get("samples_seed")
    return {
        "cells": tables.score_cells(scores),
        "metric": scores["metric"],
        "difference": tables.difference(scores["difference"]) if scores.get("difference") else None,
        "overlap": next((text for text in tables.data_warnings(found.data) if "held-out" in text), "")
        if found.data
        else "",
        "spans": [_span(who, scores[who]) for who in ("base", "tuned") if scores[who]["low"] is not None],
        "chosen": "Spread evenly over the rows." if seed is None else f"Drawn with seed {seed}, not picked by hand.",
        "samples": [_sample(sample) for sample in scores["samples"]],
    }


def _span(who: str, figures: Mapping[str, float]) -> dict[str, Any]:
    """A mean and its interval between 0 and 1, in percent of a line."""
    low, high, middle = (round(100 * figures[key], 2) for key in ("low", "high", "score"))
    return {"who": who, "low": low, "width": round(high - low, 2), "middle": middle}


def _sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    answers = [
        {"who": who, "score": format_score(sample[f"{who}_score"]), "text": shortened(sample[who])}
        for who in ("base", "tuned")
    ]
    return {
        "prompt": shortened(sample["prompt"]),
        "reference": shortened(sample["reference"]),
        "answers": answers,
    }


def _memory(found: Record) -> dict[str, Any] | None:
    if found.memory is None:
        return None
    forecast, foretold = found.forecast_bytes, _foretold(found)
    told = f"Peak {bar.peak_of_total(found.memory)}"
    told += f", forecast {format_bytes(forecast)}." if forecast is not None else "."
    told += f" Rehearsed before the first step: {foretold}." if foretold else ""
    return {"title": bar.heading(found.memory), "told": told, "chart": pictures.memory(found)}


def _speed(found: Record) -> dict[str, Any] | None:
    drawn = pictures.speed(found)
    if drawn is None:
        return None
    seconds = sum(step.step_seconds for step in found.steps)
    tokens = sum(step.tokens for step in found.steps)
    waited = sum(step.wait_seconds for step in found.steps)
    trained = sum(step.trained_tokens for step in found.steps)
    pace, of_them = (format_count(count / seconds) for count in (tokens, trained))
    told = f"{pace} tokens a second over the run, {of_them} of them trained; {format_seconds(waited)} waiting for data."
    return {"told": told, "chart": drawn}


def _proofs(found: Record) -> list[Proof]:
    proofs = []
    verdict = (found.merge or {}).get("verdict")
    if found.merge and verdict:
        rows = tables.merge_rows(found.merge, verdict)
        caption = "The merged model, loaded again and held against the live adapter on held-out rows"
        proofs.append(Proof("Merge", bool(verdict["passed"]), caption, rows))
    for name, report in found.exports:
        passed = report.get("passed")
        title = f"Export {one_line(name.removeprefix('export-').removesuffix('.json'))}"
        caption, rows = _export_told(report)
        proofs.append(Proof(title, passed if isinstance(passed, bool) else None, caption, rows))
    return proofs


def _export_told(report: dict[str, Any]) -> tuple[str, list[tuple[str, str]]]:
    """A caption and rows; of a report that another version wrote its plain values by their dotted names."""
    try:
        rows = [*tables.export_rows(report), *(("", note) for note in report["notes"])]
        return "The file, read back byte by byte and asked of llama.cpp beside the live adapter", rows
    except (LookupError, TypeError, ValueError, AttributeError):
        values = ((name.replace("_", " "), value) for name, value in leaves(report))
        plain = [
            (one_line(name), one_line(str(value))) for name, value in values if isinstance(value, str | int | float)
        ]
        return "As its report says", plain


def _ran_rows(found: Record) -> list[tuple[str, str]]:
    """Hashes and versions: what would have to be the same for the same run."""
    lock = found.lock
    if not lock:
        return []
    hashes = (("data", "data_sha256"), ("chat template", "template_sha256"), ("tokenizer", "tokenizer_sha256"))
    return [
        ("base", serving.base_title(found)),
        ("base weights", f"SHA-256 {lock['base']['sha256']}"),
        *((name, f"SHA-256 {lock[key]}") for name, key in hashes if lock.get(key)),
        ("seed", str(lock["seed"])),
        ("versions", summary.versions(lock)),
        ("run folder", found.run.path.resolve().name),
    ]
