"""A copy of qtune with one file more, run in processes of its own."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import forked

import qtune

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def qtune_with(file: Path, package: str, folder: Path) -> Run:
    """What runs Python code with the copy in `folder`, which has `file` in its `package` such as evaluate/metrics."""
    copied = folder / "qtune"
    shutil.copytree(Path(qtune.__file__).parent, copied, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(file, copied / package)

    def run(code: str, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
        path = f"{folder}{os.pathsep}{Path(__file__).parent}"
        return forked.run(["-c", code, *arguments], folder, {**os.environ, "PYTHONPATH": path})

    return run


VERBS = """
import sys
import made_once
from qtune import cli, planning
made_once.install()
planning.decide = made_once.unweighed
for verb in sys.argv[1:]:
    code = cli.main(verb.split())
    print(f"\\n{code}\\n---")
"""


def verbs(run: Run, *asked: str) -> list[tuple[int, str]]:
    """The exit code of each of these command lines, and what it prints; all in one process."""
    done = run(VERBS, *asked)
    assert done.returncode == 0, done.stderr
    told = [text.rstrip("\n").rpartition("\n") for text in done.stdout.split("---\n")[:-1]]
    return [(int(code), text) for text, _, code in told]
