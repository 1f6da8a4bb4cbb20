"""`qtune resume`: go on with a run that was stopped."""

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from qtune.commands import arguments, launcher, terminal
from qtune.commands.verb import Verb
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
    with folder.held(), terminal.going_on_told(folder):
        return _go_on(folder, options)


def _go_on(folder: "RunDir", options: Namespace) -> int:
    from qtune import resume

    with terminal.doing_of(options, is_log=True) as doing:
        recipe = resume.recipe_of(folder, options.set)
        trackers.make_ready(recipe.report.to)
        arguments.stay_offline_when_local(recipe)
        with terminal.importing(doing):
            from qtune import run  # noqa: F401  (for `drawn`)
            from qtune.ready import get_ready_again

        ready, going_on = get_ready_again(folder, recipe, options.allow_change, doing)
    console = doing.console
    resume.remember(folder, options.set)
    return terminal.told(folder, terminal.drawn(ready, folder, console, going_on), console, options.json)


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
