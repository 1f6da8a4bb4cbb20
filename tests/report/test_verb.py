"""`qtune report` as a user meets it: tables, a page, or runs side by side."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from made_events import whole_run_in

from qtune import cli
from qtune.rundir import RunDir


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.chdir(tmp_path)
    return whole_run_in(tmp_path / "one")


def test_the_page_lies_in_the_run_folder_unless_told_otherwise(run: RunDir, tmp_path: Path, capsys) -> None:
    assert cli.main(["report", str(run.path), "--html"]) == 0
    assert capsys.readouterr().out == f"{run.page}\n"
    assert run.page.read_text().startswith("<!doctype html>")
    assert cli.main(["report", str(run.path), "--html", "--output", "pages/mine.html"]) == 0
    assert (tmp_path / "pages" / "mine.html").read_text() == run.page.read_text()


def test_runs_side_by_side(run: RunDir, tmp_path: Path, capsys) -> None:
    other = whole_run_in(tmp_path / "two")
    names = [str(run.path), str(other.path)]
    assert cli.main(["report", "--compare", *names]) == 0
    assert "settings that differ" not in capsys.readouterr().out
    assert cli.main(["report", "--json", "--compare", *names]) == 0
    assert json.loads(capsys.readouterr().out)["runs"] == names
    assert cli.main(["report", "--html", "--compare", *names]) == 0
    assert (tmp_path / "comparison.html").read_text().count("<h1>") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name one run folder, or several after --compare"),
        (["RUN", "--compare", "RUN"], "name one run folder, or several after --compare"),
        (["RUN", "--output", "page.html"], "--html"),
        (["--compare", "RUN"], "two or more"),
        (["nothing-here"], "there is no such run folder"),
        (["RUN", "--html", "--output", "RUN/recipe.toml/page.html"], "Name another --output"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(run: RunDir, arguments: list[str], said: str, capsys) -> None:
    assert cli.main(["report", *(each.replace("RUN", str(run.path)) for each in arguments)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_page_needs_no_torch() -> None:
    code = "import sys; from qtune.report import compare_runs, html_page; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
