"""`qtune merge`: fold the adapter into its base, and prove the result."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from qtune.commands import arguments, terminal
from qtune.commands.verb import Verb


def add_arguments(parser: ArgumentParser) -> None:
    arguments.run_argument(parser)
    arguments.base_argument(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="new folder for the merged model")
    parser.add_argument(
        "--onto",
        choices=("auto", "dequantised", "original"),
        default="auto",
        help="base to fold into: the one trained on, the original weights, or whichever measures closer (auto)",
    )
    parser.add_argument(
        "--dtype", choices=("auto", "float16", "bfloat16", "float32"), default="auto", help="dtype of the result (auto)"
    )


def act(options: Namespace) -> None:
    with terminal.doing_of(options) as doing:
        run = arguments.open_run(options.run, options.base)
        with terminal.importing(doing):
            from qtune.merge.merge import merge_and_verify, refuse_unproven
            from qtune.report import tables

        report, verdict = merge_and_verify(run, options.output, options.onto, options.dtype, doing)
        doing.console.print(tables.merge_table(report.as_json(), verdict.as_json()), crop=False)
        refuse_unproven(options.output, verdict.faults)
    if options.json:
        terminal.print_json(verdict.as_json())


VERB = Verb(
    name="merge",
    help="fold the adapter into its base: a plain Hugging Face folder",
    arguments=add_arguments,
    refuse=arguments.refuse_given_output,
    act=act,
    order=90,
)
