"""`qtune report`: a run again, or several side by side."""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtune.commands import terminal
from qtune.commands.verb import Verb
from qtune.errors import UserError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from qtune.rundir import RunDir


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=Path, nargs="?", help="run folder")
    parser.add_argument(
        "--compare", type=Path, nargs="+", action="extend", metavar="RUN", help="put these runs side by side"
    )
    parser.add_argument("--html", action="store_true", help="write one page that opens without a network")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the page; default report.html in the run folder")


def refuse(options: Namespace) -> None:
    if (options.run is None) == (options.compare is None):
        raise UserError("report: name one run folder, or several after --compare.")
    if options.output and not options.html:
        raise UserError("report: --output says where the page goes that --html writes. Give both.")


def act(options: Namespace) -> None:
    from qtune.rundir import RunDir, reading

    runs = [RunDir.open(path) for path in options.compare or [options.run]]
    with reading(*runs):
        _compare(runs, options) if options.compare else _report(runs[0], options)


def _compare(runs: "list[RunDir]", options: Namespace) -> None:
    from qtune.report import compare_runs, html_page

    found = compare_runs.compare(runs)
    if options.html:
        html_page.write(options.output or Path("comparison.html"), html_page.comparison_page(found))
    _show(options, compare_runs.as_json(found), compare_runs.table(found), Path("comparison.html"))


def _report(run: "RunDir", options: Namespace) -> None:
    from qtune.report import html_page, summary

    if options.html:
        html_page.write(options.output or run.page, html_page.run_page(run))
    _show(options, summary.as_json(run), summary.report(run), run.page)


def _show(options: Namespace, value: Any, table: "RenderableType", page: Path) -> None:
    """A report as JSON, as the place of its page, or as tables."""
    if options.json:
        terminal.print_json(value)
    elif options.html:
        print(options.output or page)
    else:
        terminal.console_of(options).print(table, crop=False)


VERB = Verb(
    name="report",
    help="a run again, as tables or as a page; or several runs side by side",
    arguments=add_arguments,
    refuse=refuse,
    act=act,
    order=110,
)
