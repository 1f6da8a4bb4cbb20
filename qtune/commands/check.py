"""`qtune check`: a recipe and its data, held against each other."""

import dataclasses
from argparse import ArgumentParser, Namespace

from qtune.commands import arguments, terminal
from qtune.commands.verb import Verb
from qtune.train import trackers


def add_arguments(parser: ArgumentParser) -> None:
    arguments.recipe_arguments(parser)
    parser.add_argument(
        "--no-plan", action="store_true", help="leave out the plan: seconds less, and no device is asked"
    )


def act(options: Namespace) -> None:
    _without_plan(options) if options.no_plan else _with_plan(options)


def _with_plan(options: Namespace) -> None:
    with terminal.doing_of(options) as doing:
        recipe, _ = arguments.load_recipe(options)
        trackers.make_ready(recipe.report.to)
        with terminal.importing(doing):
            from qtune.ready import get_ready
        from qtune.report import plan_table

        ready = get_ready(recipe, doing=doing)
    data, plan = dataclasses.asdict(ready.prepared.report), ready.plan.as_json()
    if options.json:
        terminal.print_json({"data": data, "plan": plan})
    else:
        plan_table.show(doing.console, recipe, data, plan, with_row=True)


def _without_plan(options: Namespace) -> None:
    with terminal.doing_of(options) as doing:
        recipe, _ = arguments.load_recipe(options)
        trackers.make_ready(recipe.report.to)
        with terminal.importing(doing):
            from qtune import logs
            from qtune.evaluate.held_out import read_rows
            from qtune.report import tables

        logs.quiet_libraries()
        doing(f"reading {recipe.data.title}")
        data = dataclasses.asdict(read_rows(recipe, doing.rows).prepared.report)
    if options.json:
        terminal.print_json({"data": data, "plan": None})
    else:
        doing.console.print(tables.data_table(data))


VERB = Verb(
    name="check",
    help="validate a recipe and its data, and train nothing",
    arguments=add_arguments,
    act=act,
    said=arguments.said_by_line,
    order=40,
)
