"""`qtune data check` and `qtune data show`: a recipe's rows."""

import dataclasses
from argparse import ArgumentParser, Namespace
from pathlib import Path

from qtune.commands import arguments, terminal
from qtune.commands.verb import Verb
from qtune.errors import UserError


def add_check_arguments(parser: ArgumentParser) -> None:
    arguments.recipe_arguments(parser)
    parser.add_argument("--all", action="store_true", help="print every place, not the first three of each kind")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the lengths of rows into this file or folder")


def refuse_plot(options: Namespace) -> None:
    if options.plot is not None:
        from qtune.report import length_histogram

        length_histogram.picture_path(options.plot)


def check(options: Namespace) -> int:
    with terminal.doing_of(options) as doing:
        recipe, _ = arguments.load_recipe(options)
        with terminal.importing(doing):
            from qtune import library
            from qtune.report import length_histogram
            from qtune.report.audit_table import audit_json, audit_table

        picture = length_histogram.picture_path(options.plot) if options.plot else None
        checked = library.check_data(recipe, doing)
    if picture is not None and checked.tokens is not None:
        length_histogram.draw(checked.tokens, picture)
    if options.json:
        terminal.print_json(audit_json(checked))
    else:
        doing.console.print(audit_table(checked, options.all))
    return UserError.exit_code if checked.outcome == "faults" else 0


def add_show_arguments(parser: ArgumentParser) -> None:
    arguments.recipe_arguments(parser)
    parser.add_argument("--row", default="1", metavar="ROW", help="its number, or its place such as rows.jsonl:17; 1")
    parser.add_argument("--held-out", action="store_true", help="of the rows that data.held_out names")


def show(options: Namespace) -> None:
    with terminal.doing_of(options) as doing:
        recipe, _ = arguments.load_recipe(options)
        with terminal.importing(doing):
            from qtune import logs
            from qtune.audit.row_preview import show_row
            from qtune.model.tokenizer import load_tokenizer
            from qtune.report.row_table import row_table

        logs.quiet_libraries()
        doing(f"reading {recipe.data.title}")
        row = show_row(
            recipe.data, options.row, options.held_out, load_tokenizer(recipe.model), recipe.train.learns_pairs
        )
    if options.json:
        terminal.print_json(dataclasses.asdict(row))
    else:
        doing.console.print(row_table(row))


VERB = Verb(
    name="data",
    help="look at a recipe's rows",
    answers_json=False,
    actions=(
        Verb(
            name="check",
            help="everything that is wrong with the rows, by file and line",
            arguments=add_check_arguments,
            refuse=refuse_plot,
            act=check,
            said=arguments.said_by_line,
        ),
        Verb(
            name="show",
            help="one row as the model sees it, what is trained in colour",
            arguments=add_show_arguments,
            act=show,
            said=arguments.said_by_line,
        ),
    ),
    order=50,
)
