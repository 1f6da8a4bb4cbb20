"""`qtune resume`: go on with a run that was stopped."""

from argparse import ArgumentParser, Namespace
from contextlib import nullcontext
from typing import TYPE_CHECKING

from qtune.commands import arguments, launcher, terminal
from qtune.commands.verb import Verb
from qtune.distributed.launched import Launched
from qtune.distributed.ranks import Ranks
from qtune.errors import RecipeError, RunFolderError, UserError
from qtune.train import trackers

if TYPE_CHECKING:
    from qtune.rundir import RunDir


def add_arguments(parser: ArgumentParser) -> None:
    arguments.run_argument(parser)
    arguments.set_argument(parser)
    parser.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="FIELD",
        help="go on although this field, such as train.epochs, is not what it was; may be given again",
    )
    launcher.cards_argument(parser)


def refuse(options: Namespace) -> None:
    from qtune.resume import refuse_without_checkpoints
    from qtune.rundir import RunDir

    refuse_without_checkpoints(RunDir(options.run))
    launcher.refuse_cards_when_launched(options)


def act(options: Namespace) -> int:
    from qtune import logs
    from qtune.resume import recipe_of
    from qtune.rundir import RunDir

    folder = RunDir.open_to_resume(options.run)
    code = launcher.launch_ranks(options, lambda: recipe_of(folder, options.set))
    if code is not None:
        return code
    logs.hold()
    launched = terminal.launched_here()
    is_first = launched is None or launched.rank == 0
    with folder.held() if is_first else nullcontext(), terminal.going_on_told(folder):
        return _go_on(folder, options, launched)


def _go_on(run: "RunDir", options: Namespace, launched: Launched | None) -> int:
    from qtune import resume

    with terminal.doing_of(options, is_log=True) as doing:
        recipe = resume.recipe_of(run, options.set)
        trackers.make_ready(recipe.report.to)
        arguments.stay_offline_when_local(recipe)
        with terminal.importing(doing, launched):
            import qtune.run  # noqa: F401  (for `drawn`)
            from qtune import ready as readiness

        options.ranks = ranks = Ranks.join(launched)
        readiness.refuse_unlike_recipes(ranks, recipe)
        ready, going_on = readiness.get_ready_again(run, recipe, options.allow_change, doing, ranks)
    console = doing.console
    if ranks.is_first:
        resume.remember(run, options.set)
    folder = readiness.folder_again(ready, run, ranks)
    fitted = terminal.drawn(ready, folder, console, going_on, ranks)
    return terminal.told(folder, fitted, console, options.json, ranks)


def said(fault: UserError, options: Namespace) -> str:
    """The message, behind the line of the run's own recipe that it blames, where it blames one."""
    from qtune.recipe import load
    from qtune.resume import Invocation
    from qtune.rundir import RunDir

    run = RunDir(options.run)
    if isinstance(fault, RecipeError | RunFolderError) or not run.invocation.is_file():
        return str(fault)
    began = Invocation.of_run(run)
    return load.blamed(str(fault), run.recipe, [*began.overrides, *options.set], began.demo)


VERB = Verb(
    name="resume",
    help="go on with a run that was stopped, exactly where it was",
    arguments=add_arguments,
    refuse=refuse,
    act=act,
    said=said,
    order=20,
)
