"""`qtune run`: train a recipe."""

from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from pathlib import Path

from qtune.commands import arguments, launcher, terminal
from qtune.commands.verb import Verb
from qtune.distributed.ranks import Ranks
from qtune.train import trackers


def add_arguments(parser: ArgumentParser) -> None:
    arguments.recipe_arguments(parser)
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="run folder; default runs/NAME-DATE-TIME")
    launcher.cards_argument(parser)


def refuse(options: Namespace) -> None:
    from qtune.rundir import RUNS, refuse_unmakeable

    arguments.refuse_given_output(options) if options.output else refuse_unmakeable(RUNS / "new")
    launcher.refuse_cards_when_launched(options)


def act(options: Namespace) -> int:
    code = launcher.launch_ranks(options, lambda: arguments.load_recipe(options)[0])
    return _run(options) if code is None else code


def _run(options: Namespace) -> int:
    launched = terminal.launched_here()
    with terminal.doing_of(options, is_log=True) as doing:
        recipe, path = arguments.load_recipe(options)
        trackers.make_ready(recipe.report.to)
        with terminal.importing(doing, launched):
            from qtune import ready as readiness
            from qtune import run  # noqa: F401  (for `drawn`)
        from qtune.recipe.load import given_anywhere
        from qtune.report import plan_table
        from qtune.resume import Invocation

        options.ranks = ranks = Ranks.join(launched)
        readiness.refuse_unlike_recipes(ranks, recipe)
        with ranks.one_before_others("rows"):
            ready = readiness.get_ready(recipe, doing=doing, ranks=ranks)
        readiness.refuse_unlike_ranks(ranks, ready)
        ready = readiness.agree_on_layers(ranks, ready)
    console = doing.console
    plan_table.show(console, recipe, asdict(ready.prepared.report), ready.plan.as_json())
    invocation = Invocation(str(path.resolve().parent), tuple(given_anywhere(options.set)), options.demo)
    text = path.read_text(encoding="utf-8-sig")
    folder = readiness.start_folder(ready, text, invocation, options.output, ranks)
    with folder.held(), terminal.going_on_told(folder.whole_run):
        fitted = terminal.drawn(ready, folder, console, ranks=ranks)
        return terminal.told(folder, fitted, console, options.json, ranks)


VERB = Verb(
    name="run",
    help="train a recipe: check, score, train, score again",
    arguments=add_arguments,
    refuse=refuse,
    act=act,
    said=arguments.said_by_line,
    order=10,
)
