"""scripts/bench_against_trl.py: what takes turns, what is told of it, and one real round on the demo base."""

import argparse
import json
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import bench_against_trl  # noqa: E402
from bench_against_trl import Trial  # noqa: E402

OPTIONS = argparse.Namespace(
    data=Path("/rows.jsonl"), base=Path("/small"), steps=40, seconds=60.0, rounds=1, accumulation=1
)


def test_trl_is_tried_in_both_dtypes_padded_and_packed() -> None:
    tried = {(way.dtype, way.is_packed) for way in bench_against_trl.WAYS if way != bench_against_trl.QTUNE}
    assert tried == {(dtype, is_packed) for dtype in ("bfloat16", "float32") for is_packed in (False, True)}


def test_ratios_are_of_a_round_and_a_trial_without_a_step_has_no_speed() -> None:
    rounds = [
        {"trl": Trial(0, 0, 0.0, 4 << 20, None), "trl, packing": ours(100), "qtune": ours(300, planned=330.0)},
        {"trl": Trial(0, 0, 0.0, 4 << 20, None), "trl, packing": ours(200), "qtune": ours(400, planned=440.0)},
        {"trl": Trial(0, 0, 0.0, 4 << 20, None), "trl, packing": ours(400), "qtune": ours(400, planned=600.0)},
    ]
    told = bench_against_trl.report(rounds, OPTIONS)
    assert "| trl | no step | 4 | 0 | 0 |  | 0.50 |" in told
    assert "| trl, packing | 200 | 2 | 4 | 10 | 2.00 | 1.00 |" in told
    assert "| qtune | 400 | 2 | 4 | 10 |  |  |" in told
    assert "fastest of them, trl, packing: 2.00 times the tokens a second at 1.00 times the peak" in told
    assert "estimated 440 tokens/s: +10 % off" in told
    assert "| 1 | no step | 4 | 100 | 2 | 300 | 2 |" in told


def ours(speed: int, planned: float | None = None) -> Trial:
    return Trial(10 * speed, 4, 10.0, 2 << 20, planned)


def test_a_trial_ends_with_the_step_in_which_its_time_is_up(tmp_path) -> None:
    progress = bench_against_trl.Progress(tmp_path / "p", most_seconds=0.2)
    progress.begin()
    assert not progress.step(8)
    threading.Event().wait(0.25)
    assert progress.step(16)
    written = [json.loads(line) for line in bench_against_trl.lines_of(tmp_path / "p")]
    assert [(line["steps"], line["tokens"]) for line in written] == [(0, 0), (1, 8), (2, 16)]


def test_what_is_not_there_is_said(tmp_path, capsys) -> None:
    assert bench_against_trl.main(["--data", str(tmp_path / "none")]) == 2
    assert "is not there" in capsys.readouterr().err
    (tmp_path / "rows").write_text("")
    assert bench_against_trl.main(["--data", str(tmp_path / "rows"), "--only", "trl; other"]) == 2
    assert "no 'other'" in capsys.readouterr().err


@pytest.mark.long
def test_one_round_on_the_demo_base(tmp_path) -> None:
    rows = [{"question": f"What is {n}?", "answer": f"It is {n}, said {n} times. " * 8} for n in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    target = tmp_path / "table.md"
    arguments = ["--data", str(tmp_path / "rows.jsonl"), "--rounds", "1", "--steps", "2", "--output", str(target)]
    assert bench_against_trl.main([*arguments, "--only", "trl, packing"]) == 0
    told = target.read_text(encoding="utf-8")
    assert "The plan had estimated" in told
    assert "fastest of them, trl, packing" in told
    assert "| 2 |" in told


@pytest.mark.long
def test_a_trial_that_does_no_step_is_ended(tmp_path, monkeypatch) -> None:
    """Its child begins, and then waits for ever."""
    child = tmp_path / "child.py"
    child.write_text(
        "import json, sys, time\n"
        "open(sys.argv[-1], 'w').write(json.dumps({'steps': 0, 'tokens': 0, 'seconds': 0.0}) + '\\n')\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(bench_against_trl, "__file__", str(child))
    monkeypatch.setattr(bench_against_trl, "PATIENCE", 0.05)
    found = bench_against_trl.trial(bench_against_trl.QTUNE, OPTIONS)
    assert (found.speed, found.steps) == (None, 0)
