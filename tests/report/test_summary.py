import io
import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
from made_events import events_of_a_run, start_run, whole_run_in
from rich.console import Console

from qtune.events import StepDone
from qtune.report import summary
from qtune.report.run_record import read
from qtune.rundir import RunDir


@pytest.fixture
def started_run(tmp_path: Path) -> RunDir:
    return start_run(tmp_path)


@pytest.fixture
def whole_run(tmp_path: Path) -> RunDir:
    return whole_run_in(tmp_path)


def shown(run: RunDir, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    with console.capture() as capture:
        console.print(summary.report(run))
    return capture.get()


def written(run: RunDir) -> str:
    summary.write_summary(run)
    return run.summary.read_text(encoding="utf-8")


def test_a_record_holds_the_whole_run(whole_run: RunDir) -> None:
    found = read(whole_run)
    assert len(found.steps) == 282
    assert len(found.held_out) == 11
    assert found.memory is not None
    assert found.memory.peak_bytes == max(e.peak_bytes for e in whole_run.events() if hasattr(e, "peak_bytes"))
    assert found.train_seconds == 1_104.0
    assert found.notices == ("loading Qwen/Qwen3-4B-Instruct",)
    assert found.missing == ()


def test_the_memory_that_is_told_is_that_of_the_highest_point(whole_run: RunDir) -> None:
    highest = read(whole_run).memory
    assert highest is not None
    whole_run.record(replace(highest, phase="save", peak_bytes=highest.peak_bytes // 2))
    assert read(whole_run).memory == highest
    whole_run.record(replace(highest, phase="rehearsed step", peak_bytes=2 * highest.peak_bytes, is_rehearsal=True))
    assert read(whole_run).memory == highest  # a rehearsal is told beside the forecast


def test_the_page_tells_the_run(whole_run: RunDir) -> None:
    page = written(whole_run)
    for fact in (
        "# medical\n\nAnswers medical questions briefly\n",
        "| held-out loss | 2.113 → 1.246 |",
        "| shared words on 100 rows | 0.181 (0.15-0.21) → 0.402 (0.36-0.45) |",
        "in 18 min 24 s",
        "## Sample answers",
        "| source | rows.jsonl (prompt-completion) |",
        "## Device memory at the peak",
        "| base | 2.5 GiB |",
        "| **peak** | 4.8 GiB of 8.0 GiB |",
        "| steps | 282 | 3 epochs of 2,850 rows \\| in packs |",
        '```toml\nname = "medical"\n```',
        "torch 2.13.0, peft 0.21.2. Seed 0.",
    ):
        assert fact in page
    assert ">" not in page.split("## Before and after")[0]  # nothing is missing


def test_the_loss_table_is_a_dozen_rows_over_all_steps(whole_run: RunDir) -> None:
    found = read(whole_run)
    rows = summary.loss_rows(found)
    assert len(rows) == 12
    assert rows[-1][0] == "282"
    first = [done.loss for done in found.steps[:24]]
    assert rows[0][1] == f"{sum(first) / 24:.3f}"
    assert sum(bool(row[2]) for row in rows) == 10  # steps 280 and 282 share the last row


@pytest.mark.parametrize("steps", [1, 2, 11, 12, 13, 25])
def test_short_runs_keep_every_step_in_some_row(whole_run: RunDir, steps: int) -> None:
    found = read(whole_run)
    rows = summary.loss_rows(replace(found, steps=found.steps[:steps]))
    assert 1 <= len(rows) <= 12
    assert rows[-1][0] == str(steps)


def test_samples_cannot_break_out_of_their_fence(whole_run: RunDir) -> None:
    page = written(whole_run)
    assert "````\nWrite [b]bold[/b] | ```code```␛[2J\n````" in page
    assert "\x1b" not in page


def test_the_tables_tell_the_same(whole_run: RunDir) -> None:
    text = shown(whole_run)
    for fact in ("medical  Qwen/Qwen3-4B-Instruct", "282", "best held-out", "step 282", "before → after", "4.8 GiB"):
        assert fact in text
    assert "missing" not in text


@pytest.mark.parametrize("width", [30, 60, 100])
def test_pictures_are_drawn_for_the_width_there_is(whole_run: RunDir, width: int) -> None:
    lines = shown(whole_run, width).splitlines()
    assert max(map(len, lines)) <= width
    axis = next(line for line in lines if "└ 1 ──" in line)
    assert axis.endswith("step 282")
    assert sum("┃" in line for line in lines) == 1


def test_json_is_json_even_when_the_loss_was_none(whole_run: RunDir) -> None:
    last = read(whole_run).steps[-1]
    whole_run.record(replace(last, step=283, loss=math.nan))
    value = summary.as_json(whole_run)
    again = json.loads(json.dumps(value, allow_nan=False))
    assert again["loss"] is None
    assert again["steps"] == 283
    assert again["scores"]["tuned"]["score"] == 0.402
    assert again["memory"]["total_bytes"] == 8 * 1024**3
    assert again["adapter"] == str(whole_run.adapter)


def test_a_run_that_never_began_says_what_is_missing(started_run: RunDir) -> None:
    page, text, value = written(started_run), shown(started_run), summary.as_json(started_run)
    for name in ("lock.json", "data.json", "plan.json", "scores.json"):
        assert f"{name} is missing" in page
        assert f"{name} is missing" in text
    assert "No adapter was saved." in page
    assert page.startswith("# medical-1\n")
    assert (value["loss"], value["adapter"], value["scores"]) == (None, None, None)


@pytest.mark.parametrize(
    "gone", ["lock.json", "data.json", "plan.json", "scores.json", "metrics.jsonl", "memory.jsonl"]
)
def test_any_file_may_be_gone_or_broken(whole_run: RunDir, gone: str) -> None:
    path = whole_run.path / gone
    whole = path.read_bytes()
    path.unlink()
    assert written(whole_run)
    assert shown(whole_run)
    for seed in range(5):
        path.write_bytes(whole[: random.Random(seed).randrange(len(whole))])
        assert written(whole_run)
        assert shown(whole_run)
        assert json.dumps(summary.as_json(whole_run), allow_nan=False)


def test_half_a_last_line_costs_only_itself(whole_run: RunDir) -> None:
    whole = whole_run.metrics.read_text(encoding="utf-8")
    whole_run.metrics.write_text(whole[: len(whole) - 20], encoding="utf-8")
    found = read(whole_run)
    assert len(found.steps) == 282
    assert found.memory is not None


def test_a_damaged_line_is_named(whole_run: RunDir) -> None:
    lines = whole_run.metrics.read_text(encoding="utf-8").split("\n")
    lines[100] = lines[100][:20]
    whole_run.metrics.write_text("\n".join(lines), encoding="utf-8")
    found = read(whole_run)
    assert 0 < len(found.steps) < 282
    assert any("metrics.jsonl:101: is no event" in sentence for sentence in found.missing)


def test_one_step_is_enough_for_a_report(started_run: RunDir) -> None:
    started_run.record(next(event for event in events_of_a_run() if isinstance(event, StepDone)))
    assert "at step 1" in shown(started_run, 60)
    assert "| 1 |" in written(started_run)
