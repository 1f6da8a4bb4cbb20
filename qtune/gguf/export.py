"""A run as something llama.cpp and Ollama serve: one pass from base and adapter to a GGUF file.

There is no merged copy on the way. Every tensor is folded in float32, stored, held against what it stands for, and
forgotten; then the file is read back and must be that. Before a byte is written, what the file will say of the
tokenizer must turn texts into the ids that the base's own does. Last, llama.cpp is asked, if it is installed.
"""

import dataclasses
import math
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFReader

from qtune.errors import MachineError, UserError
from qtune.gguf import verify, writer
from qtune.gguf.contents import Draft, Target, adapter_draft, model_draft
from qtune.gguf.modelfile import MODEL_NAME, modelfile_of
from qtune.gguf.tokenizer import Vocabulary
from qtune.gguf.verify import GgufVerdict
from qtune.gguf.writer import Quant, ReadBack, Written
from qtune.merge.config_files import LICENCES, copy_files
from qtune.merge.merge import chosen_onto
from qtune.merge.merged_weights import Fold, Onto
from qtune.merge.output_folder import Progress, check_disk, counting, publish
from qtune.merge.safetensors_shards import write_synced
from qtune.rundir import RunDir, default_export, refuse_used, write_json

REPORT_NAME, ADAPTER_NAME, MODELFILE_NAME = "export_report.json", "adapter.gguf", "Modelfile"


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how it was proven. `stored` counts tensors by type; `texts` became the same ids.

    `verdict` is llama.cpp's, None where it was not asked, and `notes` say why not.
    """

    output: str
    to: Target
    file: str
    quant: Quant
    onto: Onto
    bytes: int
    stored: dict[str, int]
    texts: int
    read_back: ReadBack
    verdict: GgufVerdict | None
    export_seconds: float
    notes: tuple[str, ...]

    @property
    def faults(self) -> tuple[str, ...]:
        """What does not hold, a clause each."""
        broken = () if self.read_back.passed else (f"{self.read_back.worst_tensor} is not what was to be written",)
        return (*broken, *(self.verdict.faults if self.verdict else ()))

    def as_json(self) -> dict[str, Any]:
        return {"passed": not self.faults, "faults": self.faults, **dataclasses.asdict(self)}


def export(
    run: RunDir,
    output: Path | None,
    to: Target,
    quant: Quant | None = None,
    onto: Onto | None = None,
    rows: Sequence[Sequence[int]] = (),
    progress: Progress | None = None,
) -> ExportReport:
    """Write the run to the new folder `output`, whole or not at all, and prove it.

    Without an `output` it goes to `default_export`, without a `quant` it is 8 bits, and without `onto` what the last
    merge kept. `rows` are held-out token ids for llama.cpp, if it is installed. The report is kept in the folder as
    export_report.json, and in the run under the folder's name. Raises UserError (RunFolderError, ModelError,
    MachineError) for an output that exists, a base or adapter that does not fit the run, what GGUF cannot say, and a
    disk that is too small.
    """
    start = time.perf_counter()
    if to == "adapter-gguf" and (quant or onto):
        raise UserError("--to adapter-gguf: holds A and B in f32 and no base; leave out --quant and --onto.")
    quant = quant or "q8_0"
    output = output or default_export(run.path, to, quant)
    refuse_used(output)
    onto = None if to == "adapter-gguf" else chosen_onto(run, onto)
    fold = Fold.open(run, "float32")
    draft = adapter_draft(run, fold) if onto is None else model_draft(run, fold, quant, onto)
    text = modelfile_of(draft) if to == "ollama" else None
    check_disk(output, draft.bytes, "export")
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as staging:
        folder = Path(staging) / "export"
        path = folder / (ADAPTER_NAME if draft.vocabulary is None else MODEL_NAME)
        try:
            folder.mkdir()
            _write_small_files(draft.fold.checkpoint.folder, folder, text)
            with fold.proving_base(counting(progress, len(draft.entries))) as tell:
                written = draft.write(path, tell)
        except OSError as fault:
            raise MachineError(f"{output}: writing failed ({fault.strerror or fault}).") from None
        read = _read_back(draft, path, written)
        verdict, unasked = verify.asked(run, draft, path, output, rows, progress)
        report = ExportReport(
            output=str(output),
            to=to,
            file=path.name,
            quant=draft.quant,
            onto=draft.onto,
            bytes=path.stat().st_size,
            stored=dict(Counter(entry.kind.name for entry in draft.entries)),
            texts=len(draft.references),
            read_back=read,
            verdict=verdict,
            export_seconds=time.perf_counter() - start,
            notes=(*draft.notes, *unasked),
        )
        write_json(folder / REPORT_NAME, report.as_json())
        publish(folder, output)
    write_json(run.export_report(output.name), report.as_json())
    return report


def _write_small_files(base_folder: Path, folder: Path, modelfile: str | None) -> None:
    copy_files(base_folder, folder, LICENCES)
    if modelfile is not None:
        write_synced(folder / MODELFILE_NAME, modelfile.encode())


def _read_back(draft: Draft, path: Path, written: dict[str, Written]) -> ReadBack:
    reader = GGUFReader(path)
    found = writer.read_back(path, reader, draft.entries, written)
    if draft.vocabulary is not None and Vocabulary.read(reader) != draft.vocabulary:
        return dataclasses.replace(found, worst_fraction=math.inf, worst_tensor="the tokenizer")
    return found
