"""Who adds a file to qtune/commands has added a verb."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of qtune to which the one file was added."""
    place = tmp_path_factory.mktemp("added")
    shutil.copytree(ROOT / "qtune", place / "qtune", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "tests" / "adding" / "a_verb.py", place / "qtune" / "commands" / "count.py")
    (place / "rows.jsonl").write_text("{}\n{}\n")
    return place


def qtune(place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qtune", *arguments]
    env = {"PYTHONPATH": str(place), "COLUMNS": "100"}
    return subprocess.run(command, capture_output=True, text=True, cwd=place, env=env, check=False)


def test_it_is_in_the_help_at_its_place_and_runs(place: Path) -> None:
    told = [line.split()[0] for line in qtune(place, "--help").stdout.splitlines() if line.startswith("    ")]
    assert told[told.index("check") + 1] == "count"
    assert told[told.index("count") + 1] == "data"
    assert qtune(place, "count", "rows.jsonl").stdout == "2\n"


def test_it_refuses_as_all_do(place: Path) -> None:
    refused = qtune(place, "count", "nothing.jsonl")
    assert (refused.returncode, refused.stderr) == (2, "nothing.jsonl: there is no such file.\n")
    assert "Did you mean count?" in qtune(place, "cuont").stderr
