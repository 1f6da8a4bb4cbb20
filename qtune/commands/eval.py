"""`qtune eval`: score a finished run again."""

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path

from qtune.commands import arguments, terminal
from qtune.commands.verb import Verb
from qtune.errors import UserError


def add_arguments(parser: ArgumentParser) -> None:
    arguments.run_argument(parser)
    arguments.base_argument(parser)
    parser.add_argument("--data", type=Path, metavar="FILE", help="rows of your own, in place of the held-out ones")
    parser.add_argument("--metric", type=_metric, metavar="NAME", help="score by this; default that of the recipe")
    parser.add_argument("--rows", type=arguments.positive, metavar="N", help="rows to answer and score (all)")
    parser.add_argument(
        "--samples", type=arguments.natural, metavar="N", help="answers to show; default evaluate.samples of the recipe"
    )
    parser.add_argument(
        "--merged",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        metavar="PATH",
        help="merged models to score beside it: folders, or GGUF files (asked of llama.cpp)",
    )
    parser.add_argument("--tasks", type=_names, metavar="A,B", help="benchmarks of lm-eval, such as arc_easy")
    parser.add_argument("--task-folder", type=Path, metavar="FOLDER", help="task files of your own; they may run code")
    parser.add_argument("--limit", type=arguments.positive, metavar="N", help="rows of each benchmark at the most")


def _metric(text: str) -> str:
    from qtune.evaluate.metrics import METRICS

    if text not in METRICS:
        raise ArgumentTypeError(f"must be one of {', '.join(METRICS)}, and is {text}")
    return text


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def refuse(options: Namespace) -> None:
    from qtune.evaluate import benchmarks

    _refuse_idle(options)
    if options.data is not None and not options.data.is_file():
        raise UserError(f"--data {options.data}: there is no such file.")
    if options.tasks:
        benchmarks.refuse_absent(options.task_folder)
    for path in options.merged:
        _refuse_merged(path)


def _refuse_idle(options: Namespace) -> None:
    """Raises UserError for an option that has no effect, or cannot be, beside or without --tasks."""
    from qtune.recipe.base_kind import GGUF_SUFFIX

    idle = ("rows", "samples", "metric", "data") if options.tasks else ("task_folder", "limit")
    for name in idle:
        if getattr(options, name) is not None:
            beside = "beside" if options.tasks else "without"
            raise UserError(f"--{name.replace('_', '-')}: has no effect {beside} --tasks. Leave it out.")
    gguf = [path for path in options.merged if options.tasks and path.suffix == GGUF_SUFFIX]
    if gguf:
        raise UserError(
            f"--merged {gguf[0]}: lm-eval is run on models that transformers loads, not on GGUF files. Leave it out, or"
            " leave out --tasks to score it on the held-out rows."
        )
    if options.tasks == []:
        raise UserError("--tasks: names no task. Give one, such as arc_easy.")


def _refuse_merged(path: Path) -> None:
    from qtune.recipe import base_kind

    if not path.exists():
        raise UserError(f"--merged {path}: there is no such folder or file.")
    arguments.refuse_without_llama_cpp(path)
    is_file = path.suffix == base_kind.GGUF_SUFFIX
    if not is_file and (fault := base_kind.fault_of(path, trust_remote_code=True)):
        raise UserError(f"--merged {path}: {fault}")


def act(options: Namespace) -> None:
    with terminal.doing_of(options) as doing:
        run = arguments.open_run(options.run, options.base, *(options.tasks or ()))
        with terminal.importing(doing):
            from qtune import rescore
            from qtune.model import base
            from qtune.report import eval_table

        base.quiet_libraries()
        if options.tasks:
            found = rescore.on_benchmarks(run, options.tasks, options.task_folder, options.limit, options.merged, doing)
            table = eval_table.benchmark_table(found)
        else:
            asked = rescore.Asked(options.rows, options.samples, options.metric, options.data)
            found = rescore.on_rows(run, asked, options.merged, doing)
            table = eval_table.rows_table(found)
    terminal.print_json(found) if options.json else doing.console.print(table)


VERB = Verb(
    name="eval",
    help="score a finished run again, or on public benchmarks",
    arguments=add_arguments,
    refuse=refuse,
    act=act,
    order=80,
)
