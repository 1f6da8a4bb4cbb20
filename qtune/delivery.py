"""A finished run handed over, and proven on the way: merged into its base, or in a file that others serve."""

from pathlib import Path
from typing import Literal

from qtune.errors import VerificationFailed
from qtune.gguf.export import ExportReport, Target, export
from qtune.gguf.writer import Quant
from qtune.merge.merge import merge
from qtune.merge.merged_weights import DType, Onto
from qtune.merge.verify import Verdict, verify
from qtune.model import base
from qtune.report import tables
from qtune.report.progress_line import Doing
from qtune.rundir import RunDir, read_json


def merge_and_verify(run: RunDir, output: Path, onto: Onto | Literal["auto"], dtype: DType, doing: Doing) -> Verdict:
    """Merge a finished run into a plain folder, hold the result against the live adapter, and say how close it is.

    Raises VerificationFailed where the merged model is not the one that was trained; the figures are kept either way.
    """
    base.quiet_libraries()
    rows = read_json(run.probe)
    doing("merging")
    report = merge(run, output, onto, dtype, rows, doing.tensors, doing.console.print)
    doing("comparing with the live adapter")
    verdict = report.verdict or verify(run, output, rows)
    doing.console.print(tables.merge_table(report.as_json(), verdict.as_json()), crop=False)
    if not verdict.passed:
        raise VerificationFailed(f"{output}: {'; '.join(verdict.faults)}.")
    return verdict


def export_and_verify(
    run: RunDir, output: Path | None, to: Target, quant: Quant | None, onto: Onto | None, doing: Doing
) -> ExportReport:
    """Export a finished run for llama.cpp or Ollama, prove the file, and say how.

    Raises VerificationFailed where the file is not the model that was trained; the figures are kept either way.
    """
    base.quiet_libraries()
    rows = read_json(run.probe)
    doing("exporting")
    report = export(run, output, to, quant, onto, rows, doing.tensors)
    doing.console.print(tables.export_table(report.as_json()), crop=False)
    if report.faults:
        raise VerificationFailed(f"{report.output}: {'; '.join(report.faults)}.")
    return report
