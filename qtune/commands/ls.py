"""`qtune ls`: the runs below a folder."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from qtune.commands import terminal
from qtune.commands.verb import Verb
from qtune.errors import UserError


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, nargs="?", metavar="FOLDER", help="default runs")


def act(options: Namespace) -> None:
    from qtune.report import run_list
    from qtune.rundir import RUNS

    folder = options.folder or RUNS
    if not folder.is_dir() and options.folder:
        raise UserError(f"{folder}: there is no such folder.")
    runs = run_list.runs_below(folder) if folder.is_dir() else []
    if options.json:
        terminal.print_json([run.as_json() for run in runs])
    elif not runs:
        print(f"There is no run below {folder}. `qtune run medical --demo` makes one.")
    else:
        for line in run_list.listing(runs):
            terminal.console_of(options).print(line, soft_wrap=True)


VERB = Verb(
    name="ls",
    help="the runs below a folder: how far they came, what they learned, their size",
    arguments=add_arguments,
    act=act,
    order=120,
)
