"""`qtune rm`: runs, or their checkpoints, taken off the disk."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from qtune.commands import terminal
from qtune.commands.verb import Verb
from qtune.units import format_bytes


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder")
    parser.add_argument(
        "--checkpoints", action="store_true", help="only these: adapter and report stay, and resume begins anew"
    )
    parser.add_argument("--yes", action="store_true", help="do not ask")


def act(options: Namespace) -> None:
    from qtune import removal
    from qtune.report import run_list

    removals = [removal.Removal.of(path, options.checkpoints) for path in dict.fromkeys(options.runs)]
    console, size = terminal.console_of(options), format_bytes(sum(each.bytes for each in removals))
    for each in removals:
        told = run_list.Listed.of(each.run).told
        console.print(f"{each.path}  {format_bytes(each.bytes)}  {told}", soft_wrap=True, markup=False)
    if options.checkpoints:
        console.print("Adapter and report stay. A run that was stopped can only begin anew then.", style="dim")
    if not options.yes and not terminal.is_agreed(f"Remove {size}?", "removed"):
        console.print("Nothing was removed.")
        return
    removal.remove(removals)
    console.print(f"removed: {size}")
    if options.json:
        paths = [str(each.path) for each in removals]
        terminal.print_json({"removed": paths, "bytes": sum(each.bytes for each in removals)})


VERB = Verb(
    name="rm", help="remove runs, or their checkpoints, after asking", arguments=add_arguments, act=act, order=130
)
