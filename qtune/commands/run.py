"""`qtune run`: train a recipe."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from qtune.commands import arguments, terminal
from qtune.commands.verb import Verb

if TYPE_CHECKING:
    from rich.console import Console

    from qtune.ready import GoingOn, Ready
    from qtune.rundir import RunDir
    from qtune.train.loop import Fitted


def add_arguments(parser: ArgumentParser) -> None:
    arguments.recipe_arguments(parser)
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="run folder; default runs/NAME-DATE-TIME")


def refuse(options: Namespace) -> None:
    from qtune.rundir import RUNS, refuse_unmakeable

    arguments.refuse_given_output(options) if options.output else refuse_unmakeable(RUNS / "new")


def act(options: Namespace) -> int:
    with terminal.doing_of(options, is_log=True) as doing:
        recipe, path = arguments.load_recipe(options)
        arguments.make_tracker_ready(recipe)
        with terminal.importing(doing):
            from qtune import ready as readiness
        from qtune.recipe.load import given_anywhere
        from qtune.report import run_header
        from qtune.resume import Invocation

        ready = readiness.get_ready(recipe, doing=doing)
    console = doing.console
    run_header.show(console, recipe, asdict(ready.prepared.report), ready.plan.as_json())
    invocation = Invocation(str(path.resolve().parent), tuple(given_anywhere(options.set)), options.demo)
    folder = readiness.start_folder(ready, path.read_text(encoding="utf-8-sig"), invocation, options.output)
    with folder.held(), going_on_told(folder):
        return told(folder, drawn(ready, folder, console), console, options.json)


def drawn(ready: "Ready", folder: "RunDir", console: "Console", going_on: "GoingOn | None" = None) -> "Fitted":
    """The run, drawn on the terminal while it runs."""
    from qtune import run as story
    from qtune.report.dashboard import listener_for

    story.get_weights(ready, folder, lambda said: console.print(said, style="dim", markup=False))
    with listener_for(console, ready.title, ready.plan.steps) as dashboard:
        return story.run(ready, folder, dashboard, going_on, catches_signals=True)


@contextmanager
def going_on_told(folder: "RunDir") -> Iterator[None]:
    """A run that is broken off outside of its steps says how to go on with it."""
    from qtune.report.tables import NextCommands

    stopped = f"Stopped. Go on with it:\n  {NextCommands.of(folder).resume}"
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(stopped) from None
    except SystemExit:
        print(stopped, file=sys.stderr)
        raise


def told(folder: "RunDir", fitted: "Fitted", console: "Console", as_json: bool) -> int:
    """The end of a run, shown; returns the exit code."""
    from qtune.report import summary, tables

    console.print(tables.end_of_run(folder), crop=False)
    if as_json:
        terminal.print_json(summary.as_json(folder))
    return 0 if fitted.stopped_by is None else 128 + fitted.stopped_by


VERB = Verb(
    name="run",
    help="train a recipe: check, score, train, score again",
    arguments=add_arguments,
    refuse=refuse,
    act=act,
    said=arguments.said_by_line,
    order=10,
)
