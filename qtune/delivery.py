"""A finished run handed over, and proven on the way: merged into its base, or in a file that others serve."""

from pathlib import Path
from typing import Literal

from rich.console import Console

from qtune.deploy.export import ExportReport, Target, export
from qtune.deploy.fold import DType, Onto
from qtune.deploy.gguf_storage import Quant
from qtune.deploy.merge import merge
from qtune.deploy.verify import Verdict, verify
from qtune.errors import VerificationFailed
from qtune.model import base
from qtune.report import tables
from qtune.report.waiting import tensors_shown
from qtune.rundir import RunDir, read_json


def merge_and_verify(
    run: RunDir, output: Path, onto: Onto | Literal["auto"], dtype: DType, console: Console
) -> Verdict:
    """Merge a finished run into a plain folder, hold the result against the live adapter, and say how close it is.

    Raises VerificationFailed where the merged model is not the one that was trained; the figures are kept either way.
    """
    base.quiet_libraries()
    rows = read_json(run.probe)
    with tensors_shown(console, "merging") as (tell, say):
        report = merge(run, output, onto, dtype, rows, tell, console.print)
        say("comparing with the live adapter")
        verdict = report.verdict or verify(run, output, rows)
    console.print(tables.merge_table(report.as_json(), verdict.as_json()))
    if not verdict.passed:
        raise VerificationFailed(f"{output}: {'; '.join(verdict.faults)}.")
    return verdict


def export_and_verify(
    run: RunDir, output: Path | None, to: Target, quant: Quant | None, onto: Onto | None, console: Console
) -> ExportReport:
    """Export a finished run for llama.cpp or Ollama, prove the file, and say how.

    Raises VerificationFailed where the file is not the model that was trained; the figures are kept either way.
    """
    base.quiet_libraries()
    rows = read_json(run.probe)
    with tensors_shown(console, "exporting") as (tell, _):
        report = export(run, output, to, quant, onto, rows, tell)
    console.print(tables.export_table(report.as_json()))
    if report.faults:
        raise VerificationFailed(f"{report.output}: {'; '.join(report.faults)}.")
    return report
