"""What verbs say and ask at the terminal."""

import argparse
import gc
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

from qtune.distributed.launched import Launched
from qtune.distributed.ranks import ALONE, Ranks
from qtune.errors import RankLost, UserError
from qtune.fast_imports import quick_imports
from qtune.gpu_choice import let_segments_grow, narrow_own_process

if TYPE_CHECKING:
    from rich.console import Console

    from qtune.ready import GoingOn, Ready
    from qtune.report.dashboard import Dashboard
    from qtune.report.log_lines import PlainLines
    from qtune.report.progress_line import Doing
    from qtune.rundir import RunDir
    from qtune.train.loop import Fitted


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
def importing(doing: "Doing", launched: Launched | None = None) -> Iterator[None]:
    """For what takes seconds to import."""
    doing("importing libraries")
    narrow_own_process(launched)
    let_segments_grow()
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


def launched_here() -> Launched | None:
    """Which rank of several this process is, if it is one; the first alone has the terminal. Raises MachineError."""
    launched = Launched.taken()
    if launched is not None:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # c10d prints a trace of what it raises, too
    if launched is not None and launched.rank > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # for as long as the process
    return launched


def drawn(
    ready: "Ready", folder: "RunDir", console: "Console", going_on: "GoingOn | None" = None, ranks: Ranks = ALONE
) -> "Fitted":
    """The run, drawn on the terminal while it runs."""
    from qtune import run as story

    with ranks.one_before_others("weights"):
        story.get_weights(ready, folder, lambda said: console.print(said, style="dim", markup=False))
    with listener_for(console, ready.title, ready.plan.steps) as dashboard:
        return story.run(ready, folder, dashboard, going_on, catches_signals=True, ranks=ranks)


def listener_for(console: "Console", title: str, steps: int) -> "Dashboard | PlainLines":
    """A dashboard on a terminal that can show one, else plain lines; both are context managers and listeners."""
    from qtune.report.dashboard import Dashboard
    from qtune.report.log_lines import PlainLines
    from qtune.report.progress_line import is_screen

    if is_screen(console) and console.encoding.lower().startswith("utf"):
        return Dashboard(title, steps, console)
    return PlainLines(console.file, steps)


@contextmanager
def going_on_told(folder: "RunDir") -> Iterator[None]:
    """A run that is broken off outside of its steps, or by another rank, says how to go on with it."""
    from qtune.report.tables import NextCommands

    stopped = f"Stopped. Go on with it:\n  {NextCommands.of(folder).resume}"
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(stopped) from None
    except RankLost as lost:
        is_refused = lost.exit_code == UserError.exit_code
        raise RankLost(str(lost) if is_refused else f"{lost}\n{stopped}", lost.rank, lost.exit_code) from lost
    except SystemExit:
        print(stopped, file=sys.stderr)
        raise


def told(folder: "RunDir", fitted: "Fitted", console: "Console", as_json: bool, ranks: Ranks = ALONE) -> int:
    """The end of a run, shown by the first rank; returns the exit code."""
    from qtune.report import summary, tables

    if ranks.is_first:
        console.print(tables.end_of_run(folder), crop=False)
    if ranks.is_first and as_json:
        print_json(summary.as_json(folder))
    ranks.leave()
    return 0 if fitted.stopped_by is None else 128 + fitted.stopped_by
