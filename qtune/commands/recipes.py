"""`qtune recipes`: those inside qtune, listed, shown and copied."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from qtune.commands import terminal
from qtune.commands.verb import Verb


def ls(options: Namespace) -> None:
    from qtune.recipe import shipped_recipes

    rows = shipped_recipes.rows()
    if getattr(options, "json", False):
        terminal.print_json(rows)
        return
    from rich.table import Table

    table = Table("recipe", "about", "base", "data", box=None, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(row["name"], row["about"], row["base"], row["data"])
    terminal.console_of(options).print(table)


def add_name(parser: ArgumentParser) -> None:
    parser.add_argument("name", help="a shipped recipe, such as medical")


def show(options: Namespace) -> None:
    from qtune.recipe import shipped_recipes

    print(shipped_recipes.named(options.name).read_text(encoding="utf-8"), end="")


def add_copy_arguments(parser: ArgumentParser) -> None:
    add_name(parser)
    parser.add_argument("target", type=Path, help="the file to write, such as my.toml")


def copy(options: Namespace) -> None:
    from qtune.recipe import shipped_recipes

    target = shipped_recipes.copy(options.name, options.target)
    print(f"{target} is yours to change. Next: qtune check {target}")


VERB = Verb(
    name="recipes",
    help="list, show or copy the recipes inside qtune",
    act=ls,
    answers_json=False,
    actions=(
        Verb(name="ls", help="list them", act=ls),
        Verb(name="show", help="print one", arguments=add_name, act=show, answers_json=False),
        Verb(
            name="copy",
            help="copy one, with its sample data, to make it yours",
            arguments=add_copy_arguments,
            act=copy,
            answers_json=False,
        ),
    ),
    order=60,
)
