"""A made-up verb: how many rows a file has."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from qtune.commands.verb import Verb
from qtune.errors import UserError


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="a file of rows")


def refuse(options: Namespace) -> None:
    if not options.file.is_file():
        raise UserError(f"{options.file}: there is no such file.")


def act(options: Namespace) -> None:
    print(len(options.file.read_text(encoding="utf-8").splitlines()))


VERB = Verb("count", "count the rows of a file", act, add_arguments, refuse, order=45)
