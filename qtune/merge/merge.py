"""An adapter folded into its base: a plain Hugging Face folder that needs neither peft nor bitsandbytes.

The adapter learned on NF4 weights, so there are two bases to fold it into. `dequantised` takes the weights as the run
held them, quantised and restored, and reproduces the trained model; `original` takes the checkpoint's own, and differs
from what was trained by the quantisation error (on 64 texts mean KL 3.9e-3 against 5.6e-6). `auto` makes both, measures
both against the live adapter, and keeps the closer.

Arithmetic is float32 with one rounding at the end, a few rows in memory at a time. The `auto` dtype is the checkpoint's
own, tensor by tensor: float16 would round eight times finer than bfloat16 (mean KL 8e-6 against 1.3e-2 after 12 steps
of a small model), but the activations of models made in bfloat16 can overflow it in the server that loads the result.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

from qtune.errors import DiskFull, MachineError, UserError, VerificationFailed
from qtune.lock import Lock
from qtune.merge.merged_weights import DType, Fold, Onto
from qtune.merge.output_folder import Progress, check_disk, counting, publish
from qtune.merge.partial_merge import Staging
from qtune.merge.verify import Live, MergeVerdict, compare, refusing_small_memory, verify
from qtune.merge.weight_change import LayerChange
from qtune.model import base, lora_inits
from qtune.report.progress_line import Doing
from qtune.rundir import MERGE_REPORT, RunDir, read_json, refuse_used, write_json


@dataclass(frozen=True)
class MergeReport:
    """What was written: `onto` is the base that was used, `measured` the verdicts `auto` chose by."""

    output: str
    onto: Onto
    dtype: str
    tensors: int
    shards: int
    bytes: int
    merge_seconds: float
    layers: tuple[LayerChange, ...]
    measured: tuple[MergeVerdict, ...] = ()

    @property
    def verdict(self) -> MergeVerdict | None:
        """How the result measured, where `auto` measured it; otherwise `verify` says."""
        return next((verdict for verdict in self.measured if verdict.onto == self.onto), None)

    def as_json(self) -> dict[str, Any]:
        return {
            **dataclasses.asdict(self),
            "measured": [verdict.as_json() for verdict in self.measured],
            "verdict": self.verdict.as_json() if self.verdict else None,
        }


def merge(
    run: RunDir,
    output: Path,
    onto: Onto | Literal["auto"] = "auto",
    dtype: DType = "auto",
    rows: Sequence[Sequence[int]] = (),
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> MergeReport:
    """Fold the run's adapter into its base, and write the result to the new folder `output`, whole or not at all.

    A merge of the same things that was broken off goes on with the shards it had finished; `say` hears a sentence then.
    `rows` are held-out token ids; only `auto` on a quantised base needs them. `progress` hears tensors done, tensors in
    all, and a name. The report is kept in the run's merge.json and in the folder's merge_report.json. Raises UserError
    (RunFolderError, ModelError, MachineError) for an output that exists, a base or adapter that does not fit the run,
    and a disk that is too small.
    """
    start = time.perf_counter()
    refuse_used(output)
    fold = Fold.open(run, dtype)
    candidates = _candidates(onto, fold.lock, rows)
    tell = counting(progress, len(candidates) * len(fold.checkpoint.specs()))
    with Staging.open(output, fold.made_from(run), candidates, fold.checkpoint.shards) as staging:
        if staging.finished and say is not None:
            say(_goes_on(output, len(staging.finished), len(candidates) * len(fold.checkpoint.shards)))
        if fold.checkpoint.packed and say is not None:
            say(f"{output}: {len(fold.checkpoint.packed)} tensors that the base has in codes are written in 16 bits.")
        check_disk(output, len(candidates) * fold.weight_bytes - staging.finished_bytes, "merge")
        with _refusing_bad_disk(output), fold.proving_base(tell) as told:
            layers = {candidate: _fill(staging, fold, candidate, told) for candidate in candidates}
        measured = _measure(run, staging, candidates, rows, fold.dtype_name) if len(candidates) > 1 else ()
        chosen = min(measured, key=lambda verdict: verdict.mean_kl).onto if measured else candidates[0]
        report = MergeReport(
            output=str(output),
            onto=chosen,
            dtype=fold.dtype_name,
            tensors=len(fold.checkpoint.specs()),
            shards=len(fold.checkpoint.shards),
            bytes=fold.weight_bytes,
            merge_seconds=time.perf_counter() - start,
            layers=layers[chosen],
            measured=measured,
        )
        with _refusing_bad_disk(output):
            write_json(staging.folder(chosen) / MERGE_REPORT, report.as_json())
            publish(staging.folder(chosen), output)
    write_json(run.merge, report.as_json())
    return report


def merge_and_verify(
    run: RunDir, output: Path, onto: Onto | Literal["auto"], dtype: DType, doing: Doing
) -> tuple[MergeReport, MergeVerdict]:
    """Merge a finished run into a plain folder, and hold the result against the live adapter, where `auto` has not.

    Raises MachineError where that takes more memory than there is.
    """
    base.quiet_libraries()
    rows = read_json(run.probe)
    with refusing_small_memory(output):
        doing("merging")
        report = merge(run, output, onto, dtype, rows, doing.tensors, doing.console.print)
        doing("comparing with the live adapter")
        return report, report.verdict or verify(run, output, rows)


def refuse_unproven(output: Path | str, faults: Sequence[str]) -> None:
    """Raises VerificationFailed where what was written is not the model that was trained; its figures are kept."""
    if faults:
        raise VerificationFailed(f"{output}: {'; '.join(faults)}.")


def _fill(staging: Staging, fold: Fold, onto: Onto, tell: Callable[[str], None]) -> tuple[LayerChange, ...]:
    """Make what is not finished of the folder that is folded `onto` one base; how far every layer moved."""
    folder = staging.folder(onto)
    folder.mkdir(exist_ok=True)
    for shard in fold.checkpoint.shards:
        if (onto, shard.file_name) not in staging.finished:
            staging.add(onto, shard, fold.write_shard(folder, shard, onto, tell))
        else:
            for spec in shard.tensors:
                tell(spec.name)
    fold.write_small_files(folder)
    return tuple(layer for shard in fold.checkpoint.shards for layer in staging.finished[onto, shard.file_name].layers)


def _goes_on(output: Path, finished: int, shards: int) -> str:
    if finished == shards:
        return f"{output}: going on with a merge that was broken off; its {shards} shards are all there."
    return f"{output}: going on with a merge that was broken off, from shard {finished + 1} of {shards}."


@contextmanager
def _refusing_bad_disk(output: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, DiskFull) as fault:
        reason = getattr(fault, "strerror", None) or fault
        raise MachineError(
            f"{output}: writing failed ({reason}). Finished shards are kept: put that right, and give the same command"
            " again."
        ) from None


def _candidates(onto: Onto | Literal["auto"], lock: Lock, rows: Sequence[Sequence[int]]) -> tuple[Onto, ...]:
    """The bases to try, in order of preference where they measure alike."""
    refuse_missing_base(onto, lock)
    if not lock.quantized_modules:
        return ("original",)
    if onto == "auto" and lora_inits.of_run(lock.recipe).not_onto_original:
        return ("dequantised",)
    if lock.quantization is not None and lock.quantization.is_given:
        return ("dequantised",)
    if onto != "auto":
        return (onto,)
    if not any(len(row) > 1 for row in rows):
        raise UserError(
            "--onto auto: the run kept no held-out rows to measure with. Use --onto dequantised, which is what was"
            " trained on."
        )
    return ("dequantised", "original")


def refuse_missing_base(onto: str | None, lock: Lock) -> None:
    """Raises UserError where the dequantised base is asked for and the run had none, or the original one, and the files
    were in 4 bits already."""
    if onto == "original" and lock.quantization is not None and lock.quantization.is_given:
        raise UserError(
            f"--onto original: the files of {lock.base.name} are in 4 bits, and the original weights that these were"
            " made from are missing. Use --onto dequantised, which is what was trained on."
        )
    init = lora_inits.of_run(lock.recipe)
    if onto == "original" and init.not_onto_original:
        raise UserError(
            f'--onto original: the run began with lora.init = "{init.name}": {init.not_onto_original}. Use --onto'
            " dequantised, which is what was trained on."
        )
    if onto == "dequantised" and not lock.quantized_modules:
        raise UserError("--onto dequantised: the run's base was not quantised. Use --onto original.")


def chosen_onto(run: RunDir, onto: Onto | None) -> Onto:
    """The base that was asked for, that the last merge kept, or that the run was trained on."""
    lock = run.read_lock()
    refuse_missing_base(onto, lock)
    if onto is None and run.merge.is_file():
        onto = run.read_as(run.merge, itemgetter("onto"))
    return onto or ("dequantised" if lock.quantized_modules else "original")


def _measure(
    run: RunDir, staging: Staging, candidates: Sequence[Onto], rows: Sequence[Sequence[int]], dtype: str
) -> tuple[MergeVerdict, ...]:
    live = Live.open(run)
    return tuple(compare(live, staging.folder(onto), rows, onto, dtype) for onto in candidates)
