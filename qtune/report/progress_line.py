"""What is being done while nothing else is on the screen: a line that moves on a terminal, one line each elsewhere."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import IO, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from qtune.units import counted

FRAMES_A_SECOND = 4


class Doing:
    """Says what is being done, until it is left: `doing("planning")`, and of what is counted how far it is.

    On a terminal that is one line with a clock, drawn by a thread, and it leaves no trace. Elsewhere each thing is a
    line in `lines`, when it begins.
    """

    def __init__(self, console: Console | None = None, lines: IO[str] | None = None):
        self.console = console or Console(quiet=True)
        self._is_shown = is_screen(self.console)
        self._lines = None if self._is_shown else lines
        self._what = "starting"
        self._progress = Progress(
            SpinnerColumn("dots" if self.console.encoding.startswith("utf") else "line"),
            TextColumn("{task.description}", markup=False),
            _BarOfKnown(),
            TextColumn("{task.fields[count]}", markup=False),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            refresh_per_second=FRAMES_A_SECOND,
            redirect_stdout=False,  # standard output may carry an answer
            redirect_stderr=False,
            disable=not self._is_shown,
        )
        self._task = self._progress.add_task(self._what, total=None, count="")

    def __call__(self, what: str) -> None:
        if what == self._what:
            return
        self._what = what
        self._progress.remove_task(self._task)
        self._task = self._progress.add_task(what, total=None, count="")
        if self._lines is not None:
            say(self._lines, f"{what} ...")

    def rows(self, what: str, done: int, total: int | None) -> None:
        """So many rows are done, of `total` where that is known."""
        self(what)
        self._update(done, total, counted(done, "row") if total is None else f"{done:,} of {counted(total, 'row')}")

    def tensors(self, done: int, total: int, name: str) -> None:
        self._update(done, total, name)

    def _update(self, done: int, total: int | None, count: str) -> None:
        self._progress.update(self._task, completed=done, total=total, count=count)

    @contextmanager
    def aside(self, what: str) -> Iterator[None]:
        """While someone else draws on the terminal, such as the hub its downloads, after a line that stays."""
        self(what)
        self._progress.stop()
        if self._is_shown:
            self.console.print(what, style="dim", markup=False)
        try:
            yield
        finally:
            self._progress.start()

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


class _BarOfKnown(BarColumn):
    """A bar where it is known how much there is to do."""

    def render(self, task: Task) -> Text:  # type: ignore[override]
        return Text() if task.total is None else super().render(task)  # type: ignore[return-value]


def is_screen(console: Console) -> bool:
    """Whether pictures may be drawn on `console`: a forced terminal (FORCE_COLOR) may still be a file or a pipe."""
    return not console.quiet and console.file.isatty() and console.is_interactive and not console.is_dumb_terminal


def say(file: IO[str], line: str) -> None:
    """Write `line` at once; a reader that goes away (`qtune run ... | head`) ends the lines, not the run."""
    encoding = getattr(file, "encoding", None) or "utf-8"
    try:
        file.write(line.encode(encoding, "replace").decode(encoding) + "\n")
        file.flush()
    except BrokenPipeError:
        # What is still in the buffer must go somewhere, or Python complains of the pipe again at exit.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, file.fileno())
        os.close(nowhere)
