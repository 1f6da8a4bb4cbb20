"""`qtune export`: a GGUF file of a run, for llama.cpp and Ollama, held against the run."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from qtune.commands import arguments, terminal
from qtune.commands.verb import Verb


def add_arguments(parser: ArgumentParser) -> None:
    arguments.run_argument(parser)
    arguments.base_argument(parser)
    parser.add_argument(
        "--to",
        choices=("gguf", "ollama", "adapter-gguf"),
        default="gguf",
        help="a GGUF file, one with a Modelfile beside it, or the LoRA alone (gguf)",
    )
    parser.add_argument(
        "--quant",
        choices=("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"),
        help="how weights are stored (q8_0); the LoRA alone is always f32",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="new folder for the files; default exports/RUN-QUANT, RUN-ollama-QUANT or RUN-adapter",
    )
    parser.add_argument(
        "--onto",
        choices=("dequantised", "original"),
        help="base to fold into: default what the last merge kept, else the one trained on",
    )


def refuse(options: Namespace) -> None:
    from qtune.rundir import default_export, refuse_used

    refuse_used(options.output or default_export(options.run, options.to, options.quant))


def act(options: Namespace) -> None:
    with terminal.doing_of(options) as doing:
        run = arguments.open_run(options.run, options.base)
        with terminal.importing(doing):
            from qtune.gguf.export import export
            from qtune.merge.merge import refuse_unproven
            from qtune.model import base
            from qtune.report import tables
            from qtune.rundir import read_json

        base.quiet_libraries()
        rows = read_json(run.probe)
        doing("exporting")
        report = export(run, options.output, options.to, options.quant, options.onto, rows, doing.tensors)
        doing.console.print(tables.export_table(report.as_json()), crop=False)
        refuse_unproven(report.output, report.faults)
    if options.json:
        terminal.print_json(report.as_json())


VERB = Verb(
    name="export",
    help="write the run for llama.cpp or Ollama: a GGUF file, held against the run",
    arguments=add_arguments,
    refuse=refuse,
    act=act,
    order=100,
)
