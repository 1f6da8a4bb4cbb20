"""`qtune cache`: what is kept between runs, and the end of it."""

import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from qtune.commands import terminal
from qtune.commands.verb import Verb
from qtune.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from qtune.cache_dir import Entry

KINDS = {"nf4": "bases in 4 bits", "tokens": "tokenised rows"}  # what `cache_dir.Entry.kind` means to a person


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--clear", nargs="?", const="all", choices=["all", *KINDS], help="remove it, or one kind of it")
    parser.add_argument("--yes", action="store_true", help="do not ask")


def act(options: Namespace) -> None:
    from qtune import cache_dir

    console = terminal.console_of(options)
    every = cache_dir.entries()
    kept = [entry for entry in every if options.clear in (None, "all", entry.kind)]
    for entry in kept:
        told = f"{KINDS.get(entry.kind, entry.kind)} of {entry.what}, used {_ago(entry.used)} ago"
        console.print(f"{format_bytes(entry.bytes):>9}  {told}", soft_wrap=True, markup=False)
    console.print(_room(cache_dir.root(), every), soft_wrap=True, markup=False)
    if options.clear and kept:
        size = format_bytes(sum(entry.bytes for entry in kept))
        if not options.yes and not terminal.is_agreed(f"Remove {size}?", "removed"):
            console.print("Nothing was removed.")
            return
        for entry in kept:
            cache_dir.remove(entry)
        console.print(f"removed: {size}")
    if options.json:
        terminal.print_json(
            [{"path": str(e.path), "kind": e.kind, "of": e.what, "bytes": e.bytes, "used": e.used} for e in kept]
        )


def _ago(moment: float) -> str:
    return format_seconds(max(0.0, time.time() - moment))


def _room(home: Path | None, every: "list[Entry]") -> str:
    from qtune import cache_dir

    if home is None:
        return f"{cache_dir.VARIABLE}={cache_dir.OFF}: nothing is kept between runs."
    held, largest = sum(entry.bytes for entry in every), cache_dir.largest_bytes()
    return f"{home}: {format_bytes(held)} of at most {format_bytes(largest)} ({cache_dir.SIZE_VARIABLE} sets that)"


VERB = Verb(
    name="cache",
    help="what is kept between runs: tokenised rows, bases in 4 bits",
    arguments=add_arguments,
    act=act,
    order=135,
)
