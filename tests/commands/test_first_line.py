"""Nobody looks at a blank screen: the first line is there before the first heavy import, in a pipe too."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from made_events import LOCK

from qtune.rundir import RunDir, write_json

UNTIL_HEAVY = """
import os, sys

class Heavy:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "transformers", "tokenizers", "datasets"):
            os.write(2, b"<heavy>")
            os._exit(0)

sys.meta_path.insert(0, Heavy())
from qtune.cli import main
main(sys.argv[1:])
"""
VERBS = {
    "run": ["run", "medical", "--demo"],
    "plan": ["plan", "medical", "--demo"],
    "plan as json": ["plan", "medical", "--demo", "--json"],
    "check": ["check", "medical", "--demo"],
    "check as json": ["check", "medical", "--demo", "--json"],
    "data check": ["data", "check", "medical", "--demo"],
    "data show": ["data", "show", "medical", "--demo"],
    "resume": ["resume", "RUN"],
    "merge": ["merge", "RUN", "--output", "merged"],
    "export": ["export", "RUN"],
    "eval": ["eval", "RUN"],
    "chat": ["chat", "RUN", "--prompt", "x"],
    "doctor": ["doctor"],
    "doctor of a run": ["doctor", "--run", "RUN"],
}
IN_ITS_LOG = ("run", "resume")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A folder of a run, as far as verbs look at it before they import anything."""
    folder = tmp_path_factory.mktemp("stopped")
    (folder / "rows.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    text = 'name = "t"\n[model]\nbase = "demo"\n[data]\ntrain = "rows.jsonl"\n'
    made = RunDir.create(folder / "run", text, {"recipe_folder": str(folder), "overrides": [], "demo": False})
    lock = {**LOCK, "base": {"name": "demo", "folder": str(folder), "sha256": ""}, "model": {"base": "demo"}}
    write_json(made.lock, lock)
    made.adapter.mkdir()
    write_json(made.adapter / "adapter_config.json", {})
    return made


def command(verb: list[str], run: RunDir) -> list[str]:
    return [sys.executable, "-c", UNTIL_HEAVY, *(str(run.path) if word == "RUN" else word for word in verb)]


@pytest.mark.parametrize("name", VERBS)
def test_in_a_pipe_it_is_a_plain_line_and_never_in_the_answer(run: RunDir, tmp_path: Path, name: str) -> None:
    ended = subprocess.run(command(VERBS[name], run), capture_output=True, text=True, cwd=tmp_path, check=False)
    before, heavy, _ = ended.stderr.partition("<heavy>")
    assert heavy
    said, other = (ended.stdout, before) if name in IN_ITS_LOG else (before, ended.stdout)
    assert said.endswith("importing libraries ...\n")
    assert "\x1b" not in said
    assert other == ""


@pytest.mark.parametrize("name", ["run", "plan as json", "data check", "chat"])
def test_on_a_terminal_it_is_drawn(run: RunDir, tmp_path: Path, name: str) -> None:
    """It took a minute and more until the first line of a run."""
    master, slave = pty.openpty()
    with subprocess.Popen(
        command(VERBS[name], run),
        stdin=slave,
        stdout=slave,
        stderr=slave,
        cwd=tmp_path,
        env={**os.environ, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"},
    ):
        os.close(slave)
        output = b""
        while piece := _read(master):
            output += piece
    os.close(master)
    before, heavy, _ = output.decode().partition("<heavy>")
    assert heavy
    assert "starting" in before or "importing libraries" in before


def _read(master: int) -> bytes:
    try:
        return os.read(master, 65_536)
    except OSError:  # how Linux says that the last process has closed the terminal
        return b""


def test_an_answer_as_json_is_all_there_is_on_standard_output(run: RunDir, tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "qtune", "doctor", "--json"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert json.loads(ended.stdout)
    assert ended.stderr.splitlines() == ["importing libraries ...", "examining this machine ..."]
