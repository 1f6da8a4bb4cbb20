"""A finished run scored again: by the recipe's own metric on its held-out rows, or on public benchmarks."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qtune.data.prepare import prepare
from qtune.deploy.gguf_score import score_file
from qtune.deploy.opened import Opened
from qtune.errors import DataError, MachineError, UserError
from qtune.evaluate.benchmarks import Benchmarks
from qtune.evaluate.compare import Score, compare, score
from qtune.evaluate.held_out import HeldOut
from qtune.memory.device import find_device
from qtune.model import base
from qtune.model.tokenizer import load_tokenizer
from qtune.recipe.schema import MAX_COUNT, Evaluate, Model, Recipe
from qtune.report.waiting import rows_shown
from qtune.resume import recipe_then
from qtune.rundir import RunDir, write_json
from qtune.train.out_of_memory import EVERY_DOCUMENT, Recovery

GGUF_SUFFIX = ".gguf"
T = TypeVar("T")


@dataclass(frozen=True)
class Merged:
    """A merged model, loaded as a base is and never quantised."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: str
    compute_dtype: str

    @classmethod
    def of(cls, folder: Path, lock: dict[str, Any]) -> "Merged":
        """Raises ModelError for a folder that holds no model, MachineError for one that is too large for the device."""
        spec = Model(
            base=str(folder.resolve()), quantization="none", trust_remote_code=lock["model"]["trust_remote_code"]
        )
        device, dtype = find_device().name, lock["compute_dtype"]
        tokenizer = load_tokenizer(spec)
        try:
            return cls(base.load_base(spec, device, dtype), tokenizer, device, dtype)
        except torch.OutOfMemoryError:
            raise MachineError(
                f"{folder}: in {dtype} does not fit on this card, which held the base in 4 bits. Score it with"
                " CUDA_VISIBLE_DEVICES= in the environment, which takes the processor."
            ) from None


def on_held_out_rows(
    run: RunDir, rows: int | None, samples: int | None, merged: Sequence[Path], console: Console
) -> dict[str, Any]:
    """Base, tuned and the `merged` models (folders, or GGUF files) on the run's held-out rows; kept in the run folder.

    `rows` are answered and scored, all of them by default; the loss is over all. Raises UserError for a run without
    held-out rows, DataError where the rows are no longer those of the run.
    """
    lock, recipe = run.read_lock(), recipe_then(run)
    held_out, tokenizer = _held_out(run, recipe, lock, console)
    changes = {"rows": rows or MAX_COUNT, "samples": recipe.evaluate.samples if samples is None else samples}
    wanted, seed = recipe.evaluate.model_copy(update=changes), recipe.train.seed
    pieces = EVERY_DOCUMENT if lock.get("packing_probe", {}).get("leaks") else 1
    with console.status("scoring base and tuned"):
        before, after = _both(run, lambda who, opened: _score(who, opened, held_out, wanted, pieces))
    others = []
    for path in merged:
        with console.status(f"scoring {path}"):
            others.append(
                score_file(path, tokenizer, held_out, wanted)
                if path.suffix == GGUF_SUFFIX
                else _score(str(path), Merged.of(path, lock), held_out, wanted, pieces)
            )
    found = compare(before, after, held_out, wanted, seed, others)
    write_json(run.evaluation("rows"), found)
    return found


def _both(run: RunDir, ask: Callable[[str, Opened], T]) -> tuple[T, T]:
    """What base and tuned say; their model is let go of on return, as the next one needs its room."""
    opened = Opened.of(run)
    with opened.model.disable_adapter():
        before = ask("base", opened)
    return before, ask("tuned", opened)


def on_benchmarks(
    run: RunDir, names: Sequence[str], folder: Path | None, limit: int | None, merged: Sequence[Path], console: Console
) -> dict[str, Any]:
    """Base, tuned and the `merged` folders on tasks of lm-eval; kept in the run folder."""
    console.print(f"getting the data of {', '.join(names)}", style="dim", markup=False)
    benchmarks = Benchmarks.open(names, folder)

    def run_on(opened: Opened | Merged) -> list[dict[str, Any]]:
        model = opened.model.get_base_model() if isinstance(opened, Opened) else opened.model
        results = benchmarks.run(model, opened.tokenizer, limit, opened.device, opened.compute_dtype)
        return [dataclasses.asdict(result) for result in results]

    before, after = _both(run, lambda _, opened: run_on(opened))
    results = {"base": before, "tuned": after}
    results |= {str(path): run_on(Merged.of(path, run.read_lock())) for path in merged}
    found = {"tasks": list(names), "limit": limit, "results": results}
    write_json(run.evaluation("tasks"), found)
    return found


def _held_out(
    run: RunDir, recipe: Recipe, lock: dict[str, Any], console: Console
) -> tuple[HeldOut, PreTrainedTokenizerBase]:
    tokenizer = load_tokenizer(recipe.model)
    with rows_shown(console) as tell:
        prepared = prepare(recipe, tokenizer, tell)
    if prepared.fingerprint != lock["data_sha256"]:
        raise DataError(
            f"{recipe.data.train}: does not give the rows of {run.path} any more, so what is held out now may have been"
            " trained on. Put back the data that the run names."
        )
    if not len(prepared.held_out):
        raise UserError(f"{run.path}: kept no held-out rows to score on. --tasks runs public benchmarks instead.")
    return HeldOut.of(prepared, recipe, tokenizer), tokenizer


def _score(who: str, opened: Opened | Merged, held_out: HeldOut, wanted: Evaluate, pieces: int) -> Score:
    recovery = Recovery(pieces=pieces)
    return score(who, opened.model, opened.tokenizer, held_out, wanted, opened.device, opened.compute_dtype, recovery)
