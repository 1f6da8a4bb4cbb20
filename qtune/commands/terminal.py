"""What verbs say and ask at the terminal."""

import argparse
import gc
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

from qtune.errors import UserError
from qtune.fast_imports import quick_imports

if TYPE_CHECKING:
    from rich.console import Console

    from qtune.report.progress_line import Doing


def console_of(options: argparse.Namespace) -> "Console":
    """Standard output for people; standard error where standard output carries JSON."""
    from rich.console import Console

    return Console(stderr=getattr(options, "json", False), highlight=False)


def doing_of(options: argparse.Namespace, is_log: bool = False) -> "Doing":
    """Says on the terminal what is being done, and elsewhere in lines: of the log that a run prints with `is_log`, else
    beside the answer."""
    from qtune.report.progress_line import Doing

    console = console_of(options)
    return Doing(console, _lines_to(console, is_log))


def _lines_to(console: "Console", is_log: bool) -> IO[str] | None:
    return console.file if is_log else sys.stderr


@contextmanager
def importing(doing: "Doing") -> Iterator[None]:
    """For what takes seconds to import."""
    doing("importing libraries")
    with quick_imports():
        yield
    gc.freeze()  # nothing of what was imported is ever garbage


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def is_agreed(question: str, done: str) -> bool:
    """Whether the person at the terminal says yes. Raises UserError where there is no terminal to ask at."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UserError(
            f"There is no terminal to ask at, so nothing was {done}. Give --yes to have what is listed {done}."
        )
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
