"""A bar for what takes longer than a moment and trains nothing, such as tokenising a large file."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BEFORE_BAR = 2.0


@contextmanager
def rows_shown(console: Console | None) -> Iterator[Callable[[str, int, int | None], None]]:
    """What is done to rows, on a terminal: a callable for the word, rows done, and rows in all where that is known.

    The bar comes only after SECONDS_BEFORE_BAR, and leaves no trace.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rows]}"), TimeRemainingColumn())
    is_shown = console is not None and console.is_terminal
    progress = Progress(*columns, console=console, transient=True, disable=not is_shown)
    task = progress.add_task("", rows="")
    start = time.monotonic()

    def tell(what: str, done: int, total: int | None) -> None:
        rows = f"{done:,} rows" if total is None else f"{done:,} of {total:,} rows"
        progress.update(task, description=what, completed=done, total=total, rows=rows)
        if time.monotonic() - start >= SECONDS_BEFORE_BAR:
            progress.start()

    try:
        yield tell
    finally:
        progress.stop()


@contextmanager
def tensors_shown(
    console: Console, what: str
) -> Iterator[tuple[Callable[[int, int, str], None], Callable[[str], None]]]:
    """A bar for `what` is done to tensors: a callable for tensors done, tensors in all and a name; one for a word."""
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(what)

        def tell(done: int, total: int, name: str) -> None:
            progress.update(task, completed=done, total=total, description=f"{what} {name}")

        def say(word: str) -> None:
            progress.update(task, description=word)

        yield tell, say
