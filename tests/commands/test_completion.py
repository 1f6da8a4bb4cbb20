"""Completion as a user has it: a real shell, a half-typed line and the tab key; a shell that is not here is skipped."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyte
import pytest
from at_a_terminal import ROOT, AtTerminal

from qtune.recipe.error_messages import settings

START = {
    "bash": ["bash", "--noprofile", "--norc", "-i"],
    "zsh": ["zsh", "-f", "-i"],
    "fish": ["fish", "--no-config", "-i"],
}
SOURCE = {
    "bash": "PS1='> '; source <(qtune completion bash); echo rea''dy\n",
    "zsh": "PS1='> '; autoload -U compinit; compinit -u -D; source <(qtune completion zsh); echo rea''dy\n",
    "fish": "set -g fish_autosuggestion_enabled 0; qtune completion fish | source; echo rea''dy\n",
}
LINES = {
    "qtune pla": "qtune plan ",
    "qtune chat runs/fir": "qtune chat runs/first-run",
    "qtune check min": "qtune check mine.toml",
    "qtune run sup": "qtune run support",
    "qtune run medical --set train.learn": "qtune run medical --set train.learning_rate=",
    "qtune run medical --set train.schedule=lin": "qtune run medical --set train.schedule=linear",
    "qtune eval runs/first-run --metr": "qtune eval runs/first-run --metric",
    "qtune eval runs/first-run --metric exact": "qtune eval runs/first-run --metric exact_match",
}


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder with a run, a recipe, and `qtune` on the way to programs."""
    run = tmp_path / "runs" / "first-run"
    run.mkdir(parents=True)
    for path in (run / "recipe.toml", run / "lock.json", tmp_path / "mine.toml"):
        path.write_text("")
    program = tmp_path / "bin" / "qtune"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nimport sys\nfrom qtune.cli import main\nsys.exit(main())\n")
    program.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize("shell", START)
def test_the_tab_key_completes(shell: str, workplace: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    path = f"{workplace / 'bin'}:{os.environ['PATH']}"
    terminal = AtTerminal(START[shell], workplace, PATH=path, HOME=str(workplace))
    try:
        terminal.type(SOURCE[shell])
        read_until(terminal, "ready")
        for typed, wanted in LINES.items():
            terminal.type(f"{typed}\t")
            read_until(terminal, wanted)
            terminal.type("\x15\n")  # the line is taken back
    finally:
        terminal.close()


def read_until(terminal: AtTerminal, wanted: str) -> None:
    """Play what the shell draws until a line of the screen holds `wanted`."""
    screen = pyte.Screen(200, 50)
    stream = pyte.ByteStream(screen)
    while not any(wanted in line for line in screen.display):
        printed = terminal.read()
        assert printed, "\n".join(line.rstrip() for line in screen.display).strip()
        stream.feed(printed)


def test_every_setting_is_known_by_its_name() -> None:
    found = settings()
    assert {"train.learning_rate", "data.columns.prompt", "demo.model.base", "name"} <= found.keys()
    assert "train" not in found


def test_completing_loads_no_torch() -> None:
    code = "import qtune.commands.completion, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, env={"PYTHONPATH": str(ROOT)}).returncode == 0
