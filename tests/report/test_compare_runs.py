"""Runs side by side."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from made_events import LOCK, SCORES, events_of_a_run, start_run, whole_run_in
from rich.console import Console

from qtune.errors import UserError
from qtune.report import compare_runs, html_page
from qtune.report.compare_runs import Comparison
from qtune.rundir import RunDir, write_json

RECIPE = {
    "name": "a",
    "lora": {"rank": 16},
    "train": {"learning_rate": 2e-4, "seed": 0},
    "data": {"train": "/home/me/a.jsonl"},
}
BASE = {**LOCK, "recipe": RECIPE, "data_sha256": "d1", "template_sha256": "t1", "device": "cuda:0"}


def run_with(folder: Path, scores: dict[str, Any] | None = None, **lock: Any) -> RunDir:
    run = whole_run_in(folder)
    write_json(run.lock, {**BASE, **lock})
    write_json(run.scores, {**SCORES, **(scores or {})})
    return run


def two(tmp_path: Path, scores: dict[str, Any] | None = None, **lock: Any) -> Comparison:
    return compare_runs.compare([run_with(tmp_path / "a"), run_with(tmp_path / "b", scores, **lock)])


def shown(found: Comparison) -> str:
    console = Console(width=400, file=io.StringIO(), color_system=None)
    with console.capture() as capture:
        console.print(compare_runs.table(found))
    return capture.get()


def test_the_settings_that_differ_and_no_others(tmp_path: Path) -> None:
    other = {"name": "b", "lora": {"rank": 64}, "train": {"learning_rate": 2e-4, "seed": 0, "max_steps": 9}}
    found = two(tmp_path, recipe={**other, "data": {"train": "/somewhere/else/b.jsonl"}}, data_sha256="d2")
    assert {row.name: row.values for row in found.settings} == {
        "lora.rank": ("16", "64"),
        "data.train": ("a.jsonl", "b.jsonl"),
        "train.max_steps": ("unset", "9"),
    }


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    elsewhere = {**RECIPE, "data": {"train": "/home/you/a.jsonl"}}
    assert two(tmp_path / "same", recipe=elsewhere).settings == ()  # the same rows, wherever they lie
    found = two(tmp_path, recipe=elsewhere, data_sha256="d2")
    assert found.settings == (compare_runs.ComparedRow("data.train", ("/home/me/a.jsonl", "/home/you/a.jsonl")),)


def test_results_are_the_words_of_the_reports(tmp_path: Path) -> None:
    found = two(tmp_path, {"difference": {"score": 0.2, "low": -0.1, "high": 0.3}})
    results = {row.name: row.values for row in found.results}
    assert results["steps"] == ("282", "282")
    assert results["best held-out loss"][0] == "1.245 at step 196"
    assert results["tuned score"] == ("0.402 (0.36-0.45)",) * 2
    assert results["difference"] == ("–", "+0.200 (-0.100 to +0.300), which may be chance")
    assert results["peak memory"] == ("4.8 GiB of 8.0 GiB",) * 2
    text = shown(found)
    assert all(value in text for values in results.values() for value in values)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"data_sha256": "d2"}, "other data"),
        ({"base": {**LOCK["base"], "sha256": "x"}}, "other base weights"),
        ({"template_sha256": "t2"}, "another chat template"),
        ({"device": "cpu"}, "another kind of device"),
        ({"scores": {"metric": "exact_match"}}, "another metric"),
        ({"scores": {"rows": 7}}, "another number of rows"),
    ],
)
def test_what_cannot_be_compared_is_said(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    assert two(tmp_path / "same").cautions == ()
    found = two(tmp_path, **change)
    (caution,) = found.cautions
    assert sentence in caution
    assert caution.startswith(f"{found.names[1]}, beside {found.names[0]}: ")
    assert caution in shown(found)


@pytest.mark.parametrize("fact", ["template_sha256", "device"])
def test_what_one_of_them_never_noted_is_not_said_to_differ(tmp_path: Path, fact: str) -> None:
    """Older versions noted less."""
    assert two(tmp_path, **{fact: None}).cautions == ()


def test_a_run_that_was_stopped_is_named(tmp_path: Path) -> None:
    stopped = start_run(tmp_path / "stopped")
    for event in list(events_of_a_run())[:60]:
        stopped.record(event)
    write_json(stopped.lock, BASE)
    found = compare_runs.compare([run_with(tmp_path / "a"), stopped])
    assert any(sentence.startswith("Not finished: ") for sentence in found.cautions)
    assert json.loads(json.dumps(compare_runs.as_json(found)))["results"][0]["values"][0] == "282"


def test_runs_of_one_name_go_by_their_paths(tmp_path: Path) -> None:
    found = two(tmp_path)
    assert found.names == (str(tmp_path / "a" / "medical-1"), str(tmp_path / "b" / "medical-1"))


def test_fewer_than_two_runs_are_refused(tmp_path: Path) -> None:
    run = run_with(tmp_path)
    for runs in ([run], [run, run]):
        with pytest.raises(UserError, match="two or more run folders"):
            compare_runs.compare(runs)


def test_the_page_draws_every_run_and_up_to_four(tmp_path: Path) -> None:
    runs = [run_with(tmp_path / name) for name in "abcde"]
    four = html_page.comparison_page(compare_runs.compare(runs[:4]))
    assert all(f'class="run run-{i}"' in four for i in range(4))
    assert "<svg" not in html_page.comparison_page(compare_runs.compare(runs))
