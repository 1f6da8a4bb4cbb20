"""A finished run scored again: by the recipe's own metric on its held-out rows, or on public benchmarks."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qtune.data.packing import packed_rows
from qtune.data.prepare import prepare
from qtune.deploy.opened import Opened
from qtune.errors import DataError, MachineError, UserError
from qtune.evaluate.benchmarks import Benchmarks, Result
from qtune.evaluate.compare import HeldOut, Score, compare, figures_of, score
from qtune.evaluate.general import general_packs
from qtune.memory.device import find_device
from qtune.model import base
from qtune.recipe.schema import MAX_COUNT, Evaluate, Model, Recipe
from qtune.report.waiting import rows_shown
from qtune.rundir import RunDir, read_json, write_json


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
        tokenizer = base.load_tokenizer(spec)
        try:
            return cls(base.load_base(spec, device, dtype), tokenizer, device, dtype)
        except torch.OutOfMemoryError:
            raise MachineError(
                f"{folder}: in {dtype} does not fit on this card, which held the base in 4 bits. Score it with"
                " CUDA_VISIBLE_DEVICES= in the environment, which takes the processor."
            ) from None


def on_held_out_rows(
    run: RunDir, rows: int | None, samples: int | None, merged: Path | None, console: Console
) -> dict[str, Any]:
    """Base and tuned, or the `merged` model alone, on the run's held-out rows; kept in the run folder.

    `rows` are answered and scored, all of them by default; the loss is over all. Raises UserError for a run without
    held-out rows, DataError where the rows are no longer those of the run.
    """
    lock = read_json(run.lock)
    recipe = Recipe(**lock["recipe"])
    held_out = _held_out(run, recipe, lock, console)
    changes = {"rows": rows or MAX_COUNT, "samples": recipe.evaluate.samples if samples is None else samples}
    wanted, seed = recipe.evaluate.model_copy(update=changes), recipe.train.seed
    if merged is not None:
        with console.status(f"scoring {merged}"):
            result = _score("merged", Merged.of(merged, lock), held_out, wanted)
        found = figures_of([result], held_out, wanted, seed)
        return _kept(run, "merged", {"folder": str(merged), **found})
    with console.status("scoring base and tuned"):
        opened = Opened.of(run)
        with opened.model.disable_adapter():
            before = _score("base", opened, held_out, wanted)
        after = _score("tuned", opened, held_out, wanted)
    return _kept(run, "adapter", compare(before, after, held_out, wanted, seed))


def on_benchmarks(
    run: RunDir, names: Sequence[str], folder: Path | None, limit: int | None, merged: Path | None, console: Console
) -> dict[str, Any]:
    """Base and tuned, or the `merged` model alone, on tasks of lm-eval; kept in the run folder."""
    console.print(f"getting the data of {', '.join(names)}", style="dim", markup=False)
    benchmarks = Benchmarks.open(names, folder)

    def run_on(opened: Opened | Merged) -> list[Result]:
        model = opened.model.get_base_model() if isinstance(opened, Opened) else opened.model
        return benchmarks.run(model, opened.tokenizer, limit, opened.device, opened.compute_dtype)

    results: dict[str, list[Result]] = {}
    if merged is not None:
        results["merged"] = run_on(Merged.of(merged, read_json(run.lock)))
    else:
        opened = Opened.of(run)
        with opened.model.disable_adapter():
            results["base"] = run_on(opened)
        results["tuned"] = run_on(opened)
    told = {who: [dataclasses.asdict(result) for result in found] for who, found in results.items()}
    facts = {"tasks": list(names), "limit": limit, **({"folder": str(merged)} if merged else {})}
    return _kept(run, "merged-tasks" if merged else "tasks", {**facts, "results": told})


def _held_out(run: RunDir, recipe: Recipe, lock: dict[str, Any], console: Console) -> HeldOut:
    tokenizer = base.load_tokenizer(recipe.model)
    with rows_shown(console) as tell:
        prepared = prepare(recipe, tokenizer, tell)
    if prepared.fingerprint != lock["data_sha256"]:
        raise DataError(
            f"{recipe.data.train}: does not give the rows of {run.path} any more, so what is held out now may have been"
            " trained on. Put back the data that the run names."
        )
    if not len(prepared.held_out):
        raise UserError(f"{run.path}: kept no held-out rows to score on. --tasks runs public benchmarks instead.")
    packs = packed_rows(prepared.held_out, prepared.held_out_packs)
    general = general_packs(recipe.evaluate.general, tokenizer, recipe.data.max_tokens)
    return HeldOut(packs, prepared.held_out, prepared.stop_token_ids, general)


def _score(who: str, opened: Opened | Merged, held_out: HeldOut, wanted: Evaluate) -> Score:
    return score(who, opened.model, opened.tokenizer, held_out, wanted, opened.device, opened.compute_dtype)


def _kept(run: RunDir, name: str, found: dict[str, Any]) -> dict[str, Any]:
    write_json(run.evaluation(name), found)
    return found
