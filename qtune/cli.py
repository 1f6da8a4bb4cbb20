"""The verbs. Imports stand inside the functions, so that help and a wrong recipe answer before torch loads.

Exit codes: 0 done, 2 something the user can put right, 3 a run that does not fit, 1 our fault or a run that could not
be finished, 130 and 143 after Ctrl-C and SIGTERM.
"""

import argparse
import json
import os
import random
import re
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

from qtune import __version__
from qtune.errors import QtuneError, RecipeError, RunFolderError, UserError
from qtune.fast_imports import quick_imports
from qtune.units import GIB, format_bytes, parse_bytes

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from qtune.recipe.schema import Recipe
    from qtune.report.progress_line import Doing
    from qtune.rundir import RunDir
    from qtune.train.loop import Fitted

PLACED_VERBS = ("run", "resume", "plan", "check", "data")  # those that read a recipe
IMPORTING = "importing libraries"
CARDS_GIB = (6, 8, 12, 16, 24, 48, 80)
EXAMPLES = """\
start here:
  qtune run medical --demo          a real QLoRA run in minutes, on any machine, nothing downloaded
  qtune recipes copy medical my.toml
  qtune check my.toml               is the recipe right, is the data?
  qtune data check my.toml          everything that is wrong with the rows, by file and line
  qtune plan my.toml                will it fit, how, and what it costs
  qtune run my.toml                 train it, watch it, score it
  qtune resume runs/my-...          go on with it after Ctrl-C, a crash or a power cut
  qtune ls                          the runs so far; qtune rm takes one off the disk
  qtune chat runs/my-...            talk to it
  qtune eval runs/my-...            score it again, or on public benchmarks
  qtune export runs/my-...          a GGUF file of it, for llama.cpp and Ollama
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns its exit code."""
    parser = build_parser()
    if "_ARGCOMPLETE" in os.environ:  # the shell asks what fits behind what was typed
        from qtune import completion

        completion.answer(parser)
    options = parser.parse_args(arguments)
    if options.verb is None:
        parser.print_help()
        return 0
    signal.signal(signal.SIGTERM, _terminate)
    from qtune import early

    try:
        early.refuse(options)
        return options.act(options) or 0
    except QtuneError as fault:
        print(_placed(fault, options), file=sys.stderr)
        return fault.exit_code
    except KeyboardInterrupt as stop:
        print(str(stop) or "Stopped.", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as fault:
        return _our_fault(fault)


def _terminate(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


def _placed(fault: QtuneError, options: argparse.Namespace) -> str:
    """The message, behind the line of the recipe that it blames, where it blames one."""
    if isinstance(fault, RecipeError) or not isinstance(fault, UserError) or options.verb not in PLACED_VERBS:
        return str(fault)
    from qtune.recipe import load, shipped_recipes

    if options.verb == "resume":
        return _placed_in_run(fault, options)
    return load.blamed(str(fault), shipped_recipes.find(options.recipe), options.set, options.demo)


def _placed_in_run(fault: UserError, options: argparse.Namespace) -> str:
    from qtune.recipe import load
    from qtune.resume import Invocation
    from qtune.rundir import RunDir

    run = RunDir(options.run)
    if isinstance(fault, RunFolderError) or not run.invocation.is_file():
        return str(fault)
    began = Invocation.of_run(run)
    return load.blamed(str(fault), run.recipe, [*began.overrides, *options.set], began.demo)


def _our_fault(fault: Exception) -> int:
    """Keep the traceback in a file, and say where; bytes run out for everyone, so that is said plainly."""
    with tempfile.NamedTemporaryFile("w", prefix="qtune-", suffix=".txt", delete=False, encoding="utf-8") as file:
        traceback.print_exception(fault, file=file)
    kind = type(fault).__name__
    print(f"qtune failed, and the fault is ours: {kind}: {fault}\nThe details are in {file.name}.", file=sys.stderr)
    return 1


def build_parser() -> argparse.ArgumentParser:
    """The whole command line, as argparse sees it."""
    parser = _Parser(
        prog="qtune",
        description="QLoRA fine-tuning on one consumer GPU.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"qtune {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="verb")

    run = _verb(verbs, "run", run_recipe, "train a recipe: check, score, train, score again")
    _recipe_arguments(run)
    run.add_argument("--output", type=Path, metavar="FOLDER", help="run folder; default runs/NAME-DATE-TIME")

    resume = _verb(verbs, "resume", resume_run, "go on with a run that was stopped, exactly where it was")
    _run_argument(resume)
    _set_argument(resume)
    resume.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="FIELD",
        help="go on although this field, such as train.epochs, is not what it was; may be given again",
    )

    plan = _verb(verbs, "plan", plan_recipe, "will it fit, how, and what it costs; nothing is downloaded or trained")
    _recipe_arguments(plan)
    plan.add_argument(
        "--device-memory", type=_card, metavar="SIZE", help='plan for a card with this much, as 8GiB or "RTX 4090"'
    )
    plan.add_argument("--host-memory", type=_size, metavar="SIZE", help="and a host with this much")
    plan.add_argument("--longest", action="store_true", help="the longest context that fits, by card size")

    check = _verb(verbs, "check", check_recipe, "validate a recipe and its data, and train nothing")
    _recipe_arguments(check)
    check.add_argument(
        "--no-plan", action="store_true", help="leave out the plan: seconds less, and no device is asked"
    )

    _data_verbs(verbs)

    recipes = _verb(verbs, "recipes", list_recipes, "list, show or copy the recipes inside qtune", as_json=False)
    actions = recipes.add_subparsers(dest="action", metavar="action")
    _verb(actions, "ls", list_recipes, "list them")
    show = _verb(actions, "show", show_recipe, "print one", as_json=False)
    show.add_argument("name", help="a shipped recipe, such as medical")
    copy = _verb(actions, "copy", copy_recipe, "copy one, with its sample data, to make it yours", as_json=False)
    copy.add_argument("name", help="a shipped recipe, such as medical")
    copy.add_argument("target", type=Path, help="the file to write, such as my.toml")

    chat = _verb(verbs, "chat", hold_chat, "talk to a finished run, a merged folder or a GGUF file", as_json=False)
    chat.add_argument("run", type=Path, help="run folder, merged folder or GGUF file")
    _base_argument(chat)
    chat.add_argument("--compare", action="store_true", help="answer with the base first, then tuned")
    chat.add_argument("--prompt", metavar="TEXT", help="ask this one thing and exit")
    chat.add_argument("--system", metavar="TEXT", help="system prompt; default that of the run's recipe")
    chat.add_argument("--max-new-tokens", type=_positive, default=256, metavar="N", help="longest answer (256)")
    chat.add_argument(
        "--temperature", type=_temperature, default=0.0, metavar="T", help="draw tokens; 0 takes the likeliest (0)"
    )
    chat.add_argument("--top-p", type=_share, metavar="P", help="draw from the likeliest that have this share (1)")
    chat.add_argument("--seed", type=_natural, metavar="N", help="draw the same again; default another each time")

    evaluation = _verb(verbs, "eval", evaluate_run, "score a finished run again, or on public benchmarks")
    _run_argument(evaluation)
    _base_argument(evaluation)
    evaluation.add_argument("--data", type=Path, metavar="FILE", help="rows of your own, in place of the held-out ones")
    evaluation.add_argument("--metric", type=_metric, metavar="NAME", help="score by this; default that of the recipe")
    evaluation.add_argument("--rows", type=_positive, metavar="N", help="rows to answer and score (all)")
    evaluation.add_argument(
        "--samples", type=_natural, metavar="N", help="answers to show; default evaluate.samples of the recipe"
    )
    evaluation.add_argument(
        "--merged",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        metavar="PATH",
        help="merged models to score beside it: folders, or GGUF files (asked of llama.cpp)",
    )
    evaluation.add_argument("--tasks", type=_names, metavar="A,B", help="benchmarks of lm-eval, such as arc_easy")
    evaluation.add_argument(
        "--task-folder", type=Path, metavar="FOLDER", help="task files of your own; they may run code"
    )
    evaluation.add_argument("--limit", type=_positive, metavar="N", help="rows of each benchmark at the most")

    merge = _verb(verbs, "merge", merge_run, "fold the adapter into its base: a plain Hugging Face folder")
    _run_argument(merge)
    _base_argument(merge)
    merge.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="new folder for the merged model")
    merge.add_argument(
        "--onto",
        choices=("auto", "dequantised", "original"),
        default="auto",
        help="base to fold into: the one trained on, the original weights, or whichever measures closer (auto)",
    )
    merge.add_argument(
        "--dtype", choices=("auto", "float16", "bfloat16", "float32"), default="auto", help="dtype of the result (auto)"
    )

    export = _verb(
        verbs, "export", export_run, "write the run for llama.cpp or Ollama: a GGUF file, held against the run"
    )
    _run_argument(export)
    _base_argument(export)
    export.add_argument(
        "--to",
        choices=("gguf", "ollama", "adapter-gguf"),
        default="gguf",
        help="a GGUF file, one with a Modelfile beside it, or the LoRA alone (gguf)",
    )
    export.add_argument(
        "--quant",
        choices=("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"),
        help="how weights are stored (q8_0); the LoRA alone is always f32",
    )
    export.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="new folder for the files; default exports/RUN-QUANT, RUN-ollama-QUANT or RUN-adapter",
    )
    export.add_argument(
        "--onto",
        choices=("dequantised", "original"),
        help="base to fold into: default what the last merge kept, else the one trained on",
    )

    report = _verb(verbs, "report", report_run, "a run again, as tables or as a page; or several runs side by side")
    report.add_argument("run", type=Path, nargs="?", help="run folder")
    report.add_argument(
        "--compare", type=Path, nargs="+", action="extend", metavar="RUN", help="put these runs side by side"
    )
    report.add_argument("--html", action="store_true", help="write one page that opens without a network")
    report.add_argument("--output", type=Path, metavar="FILE", help="the page; default report.html in the run folder")

    listed = _verb(verbs, "ls", list_runs, "the runs below a folder: how far they came, what they learned, their size")
    listed.add_argument("folder", type=Path, nargs="?", metavar="FOLDER", help="default runs")
    removed = _verb(verbs, "rm", remove_runs, "remove runs, or their checkpoints, after asking")
    removed.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder")
    removed.add_argument(
        "--checkpoints", action="store_true", help="only these: adapter and report stay, and resume begins anew"
    )
    removed.add_argument("--yes", action="store_true", help="do not ask")

    push = _verb(verbs, "push", push_run, "upload the adapter, with its model card, to the Hugging Face hub")
    _run_argument(push)
    push.add_argument("address", metavar="OWNER/NAME", help="the repository; made where there is none")
    push.add_argument(
        "--what", choices=("adapter", "merged"), default="adapter", help="the adapter, or the model it was merged into"
    )
    push.add_argument("--public", action="store_true", help="make a new repository public; it is private otherwise")
    push.add_argument("--yes", action="store_true", help="upload without asking")

    doctor = _verb(verbs, "doctor", examine, "what this machine has, or which servers can take a run")
    doctor.add_argument("--run", type=Path, metavar="RUN", help="a run folder: who can serve it, and why others cannot")
    _base_argument(doctor)
    _verb(verbs, "schema", print_schema, "JSON schema of a recipe, for editors", as_json=False)
    completion = _verb(verbs, "completion", print_completion, "shell completion script", as_json=False)
    completion.add_argument("shell", choices=("bash", "zsh", "fish", "tcsh"), help="source what this prints")
    return parser


def _data_verbs(verbs: Any) -> None:
    data = _verb(verbs, "data", print_help, "look at a recipe's rows", as_json=False)
    data.set_defaults(parser=data)
    actions = data.add_subparsers(dest="action", metavar="action")
    check = _verb(actions, "check", check_data, "everything that is wrong with the rows, by file and line")
    _recipe_arguments(check)
    check.add_argument("--all", action="store_true", help="print every place, not the first three of each kind")
    check.add_argument("--plot", type=Path, metavar="FILE", help="draw the lengths of rows into this file or folder")
    show = _verb(actions, "show", show_data, "one row as the model sees it, what is trained in colour")
    _recipe_arguments(show)
    show.add_argument("--row", default="1", metavar="ROW", help="its number, or its place such as rows.jsonl:17; 1")
    show.add_argument("--held-out", action="store_true", help="of the rows that data.held_out names")


def _verb(verbs: Any, name: str, act: Any, text: str, as_json: bool = True) -> argparse.ArgumentParser:
    verb = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    verb.set_defaults(act=act)
    if as_json:
        verb.add_argument("--json", action="store_true", help="print the answer as JSON")
    return verb


def _recipe_arguments(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("recipe", help="a recipe file, or the name of a shipped one such as medical")
    _set_argument(verb)
    verb.add_argument("--demo", action="store_true", help="use what the recipe's [demo] says: small base, small data")


def _run_argument(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("run", type=Path, help="run folder")


def _base_argument(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--base", type=Path, metavar="FOLDER", help="where the run's base is now, if it was moved")


def _set_argument(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a setting, such as train.learning_rate=1e-4; may be given again",
    )


def _options_of(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Every option of a parser and its verbs."""
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                yield from _options_of(verb)


class _Parser(argparse.ArgumentParser):
    """Refuses in a sentence of its own, without the whole usage before it."""

    def error(self, message: str) -> NoReturn:
        known = list(_options_of(self))
        wrong = re.search(r"unrecognized arguments: (--?[\w-]+)", message)
        if choice := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            wrong, known = choice, re.findall(r"'([^']+)'", choice[2])
        near = get_close_matches(wrong[1], known, n=1) if wrong else []
        hint = f" Did you mean {near[0]}?" if near else ""
        print(f"{self.prog}: {message.rstrip('.?')}{'?' if message.endswith('?') else '.'}{hint}", file=sys.stderr)
        print(f"`{self.prog} --help` says what it takes.", file=sys.stderr)
        raise SystemExit(UserError.exit_code)


def _card(text: str) -> int:
    """Bytes of a size, or of a card by its name."""
    from qtune import gpu_models

    try:
        return gpu_models.memory_of(text)
    except ValueError as fault:
        raise argparse.ArgumentTypeError(str(fault)) from None


def _size(text: str) -> int:
    size = parse_bytes(text)
    if size is None:
        hint = f". Did you mean {text.strip()}GiB?" if text.strip().isdigit() else ""
        raise argparse.ArgumentTypeError(f"must be a size such as 8GiB, and is {text}{hint}")
    return size


def _positive(text: str) -> int:
    return _at_least(1, text)


def _natural(text: str) -> int:
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, and is {value}")
    return value


def _temperature(text: str) -> float:
    return _between(0.0, 10.0, text)  # far above any use: at 10 the draw is all but even


def _share(text: str) -> float:
    return _between(0.01, 1.0, text)


def _between(least: float, most: float, text: str) -> float:
    value = float(text)
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"must be {least:g} to {most:g}, and is {text}")
    return value


def _metric(text: str) -> str:
    from qtune.evaluate.metrics import METRICS

    if text not in METRICS:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(METRICS)}, and is {text}")
    return text


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _load_recipe(options: argparse.Namespace, needs_weights: bool = True) -> tuple["Recipe", Path]:
    """The recipe of the command line, with its faults reported before any heavy import."""
    from qtune import logs
    from qtune.recipe import load, shipped_recipes

    path = shipped_recipes.find(options.recipe)
    recipe = load.load(path, options.set, options.demo, needs_weights=needs_weights)
    logs.hold()
    _stay_offline_when_local(recipe)
    return recipe, path


def _make_tracker_ready(recipe: "Recipe") -> None:
    from qtune.train.trackers import TRACKERS

    if recipe.report.to is not None:
        TRACKERS[recipe.report.to].make_ready()


def _stay_offline_when_local(recipe: "Recipe") -> None:
    """Without a hub name in the recipe no library may ask the network for anything."""
    _stay_offline_with(recipe.model.base, recipe.data.train, recipe.data.held_out)


def _stay_offline_with(*sources: str | None) -> None:
    if all(source is None or source == "demo" or Path(source).is_absolute() for source in sources):
        os.environ["HF_HUB_OFFLINE"] = "1"


def _open_to_use(path: Path, base: Path | None, *more: str | None) -> "RunDir":
    """A run to answer, merge or export with; its libraries ask no network where its base, and what else is needed, is
    on this machine."""
    from qtune import early, logs
    from qtune.rundir import RunDir

    run = RunDir.open(path, base)
    early.refuse_unusable(run)
    logs.hold()
    _stay_offline_with(run.read_lock().base_name, *more)
    return run


def _console(options: argparse.Namespace) -> "Console":
    """Standard output for people; standard error where standard output carries JSON."""
    from rich.console import Console

    return Console(stderr=getattr(options, "json", False), highlight=False)


def _doing(options: argparse.Namespace) -> "Doing":
    """Says on the terminal what is being done, and elsewhere in lines."""
    from qtune.report.progress_line import Doing

    console = _console(options)
    return Doing(console, _log_of(options, console))


def _log_of(options: argparse.Namespace, console: "Console") -> IO[str] | None:
    """Where lines go that say what is being done: into the log that a run prints, beside the answer of other verbs."""
    return console.file if options.verb in ("run", "resume") else sys.stderr


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def run_recipe(options: argparse.Namespace) -> int:
    with _doing(options) as doing:
        recipe, path = _load_recipe(options)
        _make_tracker_ready(recipe)
        doing(IMPORTING)
        with quick_imports():
            from qtune import run as story
        from qtune.recipe.load import given_anywhere
        from qtune.resume import Invocation

        ready = story.get_ready(recipe, doing=doing)
    console = doing.console
    story.show(ready, console)
    invocation = Invocation(str(path.resolve().parent), tuple(given_anywhere(options.set)), options.demo)
    folder = story.start_folder(ready, path.read_text(encoding="utf-8-sig"), invocation, options.output)
    with folder.held(), _going_on_told(folder):
        return _told(folder, story.run(ready, folder, console), console, options.json)


def resume_run(options: argparse.Namespace) -> int:
    from qtune import logs
    from qtune.rundir import RunDir

    folder = RunDir.open_to_resume(options.run)
    logs.hold()
    with folder.held(), _going_on_told(folder):
        return _resume_held(folder, options)


def _resume_held(folder: "RunDir", options: argparse.Namespace) -> int:
    from qtune import resume

    with _doing(options) as doing:
        recipe = resume.recipe_of(folder, options.set)
        _make_tracker_ready(recipe)
        _stay_offline_when_local(recipe)
        doing(IMPORTING)
        with quick_imports():
            from qtune import run as story

        ready, point, resumed = story.get_ready_again(folder, recipe, options.allow_change, doing)
    console = doing.console
    resume.remember(folder, options.set)
    return _told(folder, story.run(ready, folder, console, point, resumed), console, options.json)


@contextmanager
def _going_on_told(folder: "RunDir") -> Iterator[None]:
    """A run that is broken off outside of its steps says how to go on with it."""
    from qtune.report.tables import NextCommands

    told = f"Stopped. Go on with it:\n  {NextCommands.of(folder).resume}"
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(told) from None
    except SystemExit:
        print(told, file=sys.stderr)
        raise


def _told(folder: "RunDir", fitted: "Fitted", console: "Console", as_json: bool) -> int:
    """The end of a run, shown; returns the exit code."""
    from qtune.report import summary, tables

    console.print(tables.end_of_run(folder), crop=False)
    if as_json:
        _print_json(summary.as_json(folder))
    return 0 if fitted.stopped_by is None else 128 + fitted.stopped_by


def plan_recipe(options: argparse.Namespace) -> int:
    with _doing(options) as doing:
        recipe, _ = _load_recipe(options, needs_weights=False)
        doing(IMPORTING)
        with quick_imports():
            from qtune import run as story
        from qtune import hardware
        from qtune.plan.planner import budget_of
        from qtune.report import plan_table

        here = hardware.find_device()
        asked, host = options.device_memory, options.host_memory
        if options.longest:
            sizes = [asked] if asked else [gib * GIB for gib in CARDS_GIB]
            found = story.longest_contexts(recipe, [hardware.imagined_card(size, host, here) for size in sizes], doing)
            rows = [
                {
                    "device_bytes": card.total_bytes,
                    "host_bytes": budget_of(recipe, card).host_bytes,
                    "tokens": most.tokens,
                    "bound": most.bound,
                }
                for card, most in found
            ]
        else:
            target = hardware.imagined_card(asked, host, here) if asked else hardware.with_host(here, host)
            plan = story.plan_without_downloads(recipe, target, doing)
    if options.longest:
        _print_json(rows) if options.json else doing.console.print(plan_table.longest_table(recipe.model.base, rows))
        return 0
    if options.json:
        _print_json(plan.as_json())
    else:
        doing.console.print(plan_table.whole_plan(plan.as_json()))
    story.refuse_unless_it_fits(recipe, plan)
    return 0


def check_recipe(options: argparse.Namespace) -> int:
    if options.no_plan:
        return _check_without_plan(options)
    with _doing(options) as doing:
        recipe, _ = _load_recipe(options)
        _make_tracker_ready(recipe)
        doing(IMPORTING)
        import dataclasses

        with quick_imports():
            from qtune import run as story

        ready = story.get_ready(recipe, doing=doing)
    if options.json:
        _print_json({"data": dataclasses.asdict(ready.prepared.report), "plan": ready.plan.as_json()})
    else:
        story.show(ready, doing.console, with_row=True)
    return 0


def _check_without_plan(options: argparse.Namespace) -> int:
    with _doing(options) as doing:
        recipe, _ = _load_recipe(options)
        _make_tracker_ready(recipe)
        doing(IMPORTING)
        import dataclasses

        from qtune import logs, reading
        from qtune.report import tables

        logs.quiet_libraries()
        doing(f"reading {recipe.data.train}")
        data = dataclasses.asdict(reading.read(recipe, doing.rows).prepared.report)
    _print_json({"data": data, "plan": None}) if options.json else doing.console.print(tables.data_table(data))
    return 0


def print_help(options: argparse.Namespace) -> int:
    options.parser.print_help()
    return 0


def check_data(options: argparse.Namespace) -> int:
    with _doing(options) as doing:
        recipe, _ = _load_recipe(options)
        doing(IMPORTING)
        from qtune import logs
        from qtune.audit.audit import audit
        from qtune.audit.run_refusals import refusals
        from qtune.audit.thresholds import judge
        from qtune.evaluate.held_out import fault_asked
        from qtune.model.tokenizer import load_tokenizer
        from qtune.recipe.paths import GENERAL_WORDS
        from qtune.report import length_histogram
        from qtune.report.audit_table import audit_json, audit_table

        picture = length_histogram.picture_path(options.plot) if options.plot else None
        logs.quiet_libraries()
        doing(f"reading {recipe.model.base}")
        tokenizer = load_tokenizer(recipe.model)
        if recipe.evaluate.general not in GENERAL_WORDS:
            from qtune.evaluate.forgetting import general_packs

            general_packs(recipe.evaluate.general, tokenizer, recipe.data.max_tokens)  # a run refuses one without text
        doing(f"reading {recipe.data.train}")
        found = audit(recipe.data, tokenizer, doing.rows, fault_asked(recipe.evaluate))
        checked = judge(found, recipe.data, refusals(found, recipe, tokenizer))
    if picture is not None and checked.tokens is not None:
        length_histogram.draw(checked.tokens, picture)
    if options.json:
        _print_json(audit_json(checked))
    else:
        doing.console.print(audit_table(checked, options.all))
    return UserError.exit_code if checked.outcome == "faults" else 0


def show_data(options: argparse.Namespace) -> int:
    with _doing(options) as doing:
        recipe, _ = _load_recipe(options)
        doing(IMPORTING)
        import dataclasses

        from qtune import logs
        from qtune.audit.row_preview import show_row
        from qtune.model.tokenizer import load_tokenizer
        from qtune.report.row_table import row_table

        logs.quiet_libraries()
        doing(f"reading {recipe.data.train}")
        row = show_row(recipe.data, options.row, options.held_out, load_tokenizer(recipe.model))
    if options.json:
        _print_json(dataclasses.asdict(row))
    else:
        doing.console.print(row_table(row))
    return 0


def list_recipes(options: argparse.Namespace) -> int:
    from qtune.recipe import shipped_recipes

    rows = shipped_recipes.rows()
    if getattr(options, "json", False):
        _print_json(rows)
        return 0
    from rich.table import Table

    table = Table("recipe", "about", "base", "data", box=None, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(row["name"], row["about"], row["base"], row["data"])
    _console(options).print(table)
    return 0


def show_recipe(options: argparse.Namespace) -> int:
    from qtune.recipe import shipped_recipes

    print(shipped_recipes.named(options.name).read_text(encoding="utf-8"), end="")
    return 0


def copy_recipe(options: argparse.Namespace) -> int:
    from qtune.recipe import shipped_recipes

    target = shipped_recipes.copy(options.name, options.target)
    print(f"{target} is yours to change. Next: qtune check {target}")
    return 0


def hold_chat(options: argparse.Namespace) -> int:
    with ExitStack() as opened:
        with _doing(options) as doing:
            from qtune import early, logs

            what = early.model_at(options.run) or _open_to_use(options.run, options.base)
            if isinstance(what, Path):
                logs.hold()
                _stay_offline_with(str(what.absolute()))
            doing(IMPORTING)
            from qtune.evaluate.generate import Choosing
            from qtune.share import chat, chat_models

            seed = random.randrange(2**31) if options.seed is None else options.seed
            choosing = Choosing(options.temperature, options.top_p or 1.0, seed)
            doing("loading the model")
            speaker = opened.enter_context(chat_models.opened(what))
        system = speaker.system if options.system is None else options.system
        talk = chat.Chat(speaker, choosing, system, options.max_new_tokens)
        chat.converse(talk, doing.console, options.compare, options.prompt)
    return 0


def evaluate_run(options: argparse.Namespace) -> int:
    with _doing(options) as doing:
        run = _open_to_use(options.run, options.base, *(options.tasks or ()))
        doing(IMPORTING)
        from qtune import evaluation
        from qtune.model import base
        from qtune.report import eval_table

        base.quiet_libraries()
        if options.tasks:
            found = evaluation.on_benchmarks(
                run, options.tasks, options.task_folder, options.limit, options.merged, doing
            )
            table = eval_table.benchmark_table(found)
        else:
            asked = evaluation.Asked(options.rows, options.samples, options.metric, options.data)
            found = evaluation.on_rows(run, asked, options.merged, doing)
            table = eval_table.rows_table(found)
    _print_json(found) if options.json else doing.console.print(table)
    return 0


def merge_run(options: argparse.Namespace) -> int:
    with _doing(options) as doing:
        run = _open_to_use(options.run, options.base)
        doing(IMPORTING)
        from qtune import delivery

        verdict = delivery.merge_and_verify(run, options.output, options.onto, options.dtype, doing)
    if options.json:
        _print_json(verdict.as_json())
    return 0


def export_run(options: argparse.Namespace) -> int:
    with _doing(options) as doing:
        run = _open_to_use(options.run, options.base)
        doing(IMPORTING)
        from qtune import delivery

        report = delivery.export_and_verify(run, options.output, options.to, options.quant, options.onto, doing)
    if options.json:
        _print_json(report.as_json())
    return 0


def report_run(options: argparse.Namespace) -> int:
    from qtune.rundir import RunDir, reading

    if (options.run is None) == (options.compare is None):
        raise UserError("report: name one run folder, or several after --compare.")
    if options.output and not options.html:
        raise UserError("report: --output says where the page goes that --html writes. Give both.")
    runs = [RunDir.open(path) for path in options.compare or [options.run]]
    with reading(*runs):
        return _compared(runs, options) if options.compare else _reported(runs[0], options)


def _compared(runs: "list[RunDir]", options: argparse.Namespace) -> int:
    from qtune.report import compare_runs, html_page

    found = compare_runs.compare(runs)
    if options.html:
        html_page.write(options.output or Path("comparison.html"), html_page.comparison_page(found))
    return _shown(options, compare_runs.as_json(found), compare_runs.table(found), Path("comparison.html"))


def _reported(run: "RunDir", options: argparse.Namespace) -> int:
    from qtune.report import html_page, summary

    if options.html:
        html_page.write(options.output or run.page, html_page.run_page(run))
    return _shown(options, summary.as_json(run), summary.report(run), run.page)


def _shown(options: argparse.Namespace, value: Any, table: "RenderableType", page: Path) -> int:
    """A report as JSON, as the place of its page, or as tables."""
    if options.json:
        _print_json(value)
    elif options.html:
        print(options.output or page)
    else:
        _console(options).print(table, crop=False)
    return 0


def list_runs(options: argparse.Namespace) -> int:
    from qtune.report import run_list
    from qtune.rundir import RUNS

    folder = options.folder or RUNS
    if not folder.is_dir() and options.folder:
        raise UserError(f"{folder}: there is no such folder.")
    found = run_list.runs_below(folder) if folder.is_dir() else []
    if options.json:
        _print_json([run.as_json() for run in found])
    elif not found:
        print(f"There is no run below {folder}. `qtune run medical --demo` makes one.")
    else:
        for line in run_list.listing(found):
            _console(options).print(line, soft_wrap=True)
    return 0


def remove_runs(options: argparse.Namespace) -> int:
    from qtune import removal
    from qtune.report import run_list

    found = [removal.Removal.of(path, options.checkpoints) for path in dict.fromkeys(options.runs)]
    console, size = _console(options), format_bytes(sum(each.bytes for each in found))
    for each in found:
        told = run_list.Listed.of(each.run).told
        console.print(f"{each.path}  {format_bytes(each.bytes)}  {told}", soft_wrap=True, markup=False)
    if options.checkpoints:
        console.print("Adapter and report stay. A run that was stopped can only begin anew then.", style="dim")
    if not options.yes and not _agreed(f"Remove {size}?", "removed"):
        console.print("Nothing was removed.")
        return 0
    removal.remove(found)
    console.print(f"removed: {size}")
    if options.json:
        _print_json({"removed": [str(each.path) for each in found], "bytes": sum(each.bytes for each in found)})
    return 0


def push_run(options: argparse.Namespace) -> int:
    from qtune.rundir import RunDir, reading

    run = RunDir.open(options.run)
    console = _console(options)
    from huggingface_hub import HfApi

    from qtune.share import push

    api = HfApi()
    push.refuse_without_token(api)
    with reading(run):
        upload = push.prepare(run, options.address, options.what)
    console.print(push.table(upload, options.public))
    if not options.yes and not _agreed(f"Upload to {options.address}?", "uploaded"):
        console.print("Nothing was uploaded.")
        return 0
    place = push.push(upload, options.public, api)
    console.print(f"uploaded: {place}", markup=False)
    if options.json:
        _print_json({"address": place, "files": [name for name, _ in upload.files], "bytes": upload.bytes})
    return 0


def _agreed(question: str, done: str) -> bool:
    """Whether the person at the terminal says yes. Raises UserError where there is no terminal to ask at."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UserError(
            f"There is no terminal to ask at, so nothing was {done}. Give --yes to have what is listed {done}."
        )
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def examine(options: argparse.Namespace) -> int:
    if options.run:
        return _examine_run(options)
    from qtune import logs

    logs.hold()
    with _doing(options) as doing:
        doing(IMPORTING)
        from qtune import doctor

        doing("examining this machine")
        findings = doctor.examine()
    if options.json:
        _print_json([finding.as_json() for finding in findings])
    else:
        doing.console.print(doctor.table(findings))
    return 0 if all(finding.is_fine for finding in findings) else UserError.exit_code


def _examine_run(options: argparse.Namespace) -> int:
    from qtune import logs
    from qtune.rundir import RunDir

    with _doing(options) as doing:
        run = RunDir.open(options.run, options.base)
        logs.hold()
        _stay_offline_with(run.read_lock().base_name)
        doing(IMPORTING)
        from qtune.model import base
        from qtune.share import servers

        base.quiet_libraries()
        doing("trying what each server reads")
        found = servers.servers(run)
    if options.json:
        _print_json([server.as_json() for server in found])
    else:
        doing.console.print(servers.table(found), crop=False)
    return 0


def print_schema(options: argparse.Namespace) -> int:
    from qtune.recipe import load

    _print_json(load.json_schema())
    return 0


def print_completion(options: argparse.Namespace) -> int:
    from qtune import completion

    print(completion.script(options.shell))
    return 0


if __name__ == "__main__":
    sys.exit(main())
