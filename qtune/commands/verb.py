"""What a verb of the command line is: a file in this package holds one, its arguments beside its action.

Files of verbs import nothing heavy at their top: help and mistakes are answered before torch loads.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass

from qtune.errors import UserError


def takes_nothing(parser: ArgumentParser) -> None:
    """A verb without arguments."""


def refuses_nothing(options: Namespace) -> None:
    """A verb of which nothing can be told before it begins."""


def print_help(options: Namespace) -> None:
    """A verb that needs one of its actions."""
    options.parser.print_help()


def said_as_it_is(fault: UserError, options: Namespace) -> str:
    return str(fault)


@dataclass(frozen=True)
class Verb:
    """`qtune NAME`, at its place in the help by `order`.

    `refuse` raises UserError for what the command line, a run's own JSON and a look at the disk tell cannot be, before
    anything is imported, read or planned, which takes from seconds to minutes. `act` returns the exit code, None for 0.
    `said` is a refusal behind the line of the recipe that it blames. `actions` are verbs of this one, as of `qtune
    data`; with `answers_json` there is a --json.
    """

    name: str
    help: str
    act: Callable[[Namespace], int | None] = print_help
    arguments: Callable[[ArgumentParser], None] = takes_nothing
    refuse: Callable[[Namespace], None] = refuses_nothing
    said: Callable[[UserError, Namespace], str] = said_as_it_is
    answers_json: bool = True
    actions: tuple["Verb", ...] = ()
    order: int = 1000  # behind those that have a place
