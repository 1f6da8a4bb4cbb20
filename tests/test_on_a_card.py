"""The real code on a card that is none (`support/card.py`), in a process a file: see `on_a_card/__main__.py`."""

from pathlib import Path

import forked
import pytest

FOLDER = Path(__file__).resolve().parent / "on_a_card"


LONG = ("whole_runs.py",)  # each step of a run is in passes.py, too
FILES = [path.name for path in sorted(FOLDER.glob("[!_]*.py"))]


@pytest.mark.parametrize("file", [pytest.param(each, marks=[pytest.mark.long] * (each in LONG)) for each in FILES])
def test_on_a_card(request: pytest.FixtureRequest, file: str) -> None:
    asked = ["--all"] if request.config.getoption("--all") else []
    ended = forked.run([FOLDER / "__main__.py", FOLDER / file, *asked])
    assert ended.returncode == 0, ended.stdout + ended.stderr
