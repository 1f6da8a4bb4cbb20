"""A finished run scored again: on its held-out rows, on rows of one's own, or on public benchmarks."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy
from transformers import PreTrainedTokenizerBase

from qtune.data import token_cache
from qtune.data.data_report import Tally
from qtune.data.dataset import Examples, ExampleWriter
from qtune.data.packing import packed_rows
from qtune.data.prepare import encoding_of, prepare, take_rows
from qtune.data.ragged import Ragged
from qtune.data.row_stream import format_of
from qtune.data.rows import RawRow, recognise
from qtune.data.sources import Source, Tell
from qtune.data.tokenize import Encoder
from qtune.errors import DataError, QtuneError, UserError
from qtune.evaluate.before_after import Score, compare, score
from qtune.evaluate.held_out import HeldOut, refuse_unscorable, scored_examples
from qtune.lock import Lock
from qtune.memory.oom_recovery import Recovery, pieces_to_begin_with
from qtune.model import adapter
from qtune.model.loaded import Loaded
from qtune.model.open_model import model_of, open_merged, open_run
from qtune.model.start_adapter import StartAdapter
from qtune.model.tokenizer import load_tokenizer
from qtune.recipe.base_kind import GGUF_SUFFIX
from qtune.recipe.schema import MAX_COUNT, Columns, Data, Evaluate, Recipe
from qtune.report.progress_line import Doing
from qtune.resume import recipe_then
from qtune.rundir import RunDir, write_json
from qtune.train.objectives import OBJECTIVES

T = TypeVar("T")


@dataclass(frozen=True)
class Asked:
    """What a run is to be scored on: its held-out rows, or those of the file `data`; of them the first `rows`, by
    `metric`, with so many `samples` shown. What is None is as the recipe has it, but for `rows`: all of them."""

    rows: int | None = None
    samples: int | None = None
    metric: str | None = None
    data: Path | None = None

    def settled(self, recipe: Recipe) -> Evaluate:
        given = {"samples": self.samples, "metric": self.metric, "rows": self.rows or MAX_COUNT}
        return recipe.evaluate.model_copy(update={name: value for name, value in given.items() if value is not None})

    @property
    def name(self) -> str:
        """Of the file that keeps the scores: the held-out rows by the recipe's metric keep theirs."""
        parts = ("rows" if self.data is None else f"data-{self.data.stem}", self.metric)
        return "-".join(filter(None, parts))


@dataclass(frozen=True)
class OwnRows:
    """The rows of `path`, and those that are of no use."""

    path: Path
    format: str
    examples: Examples
    dropped: tuple[Tally, ...]

    @classmethod
    def read(
        cls, path: Path, data: Data, tokenizer: PreTrainedTokenizerBase, tell: Tell, in_pairs: bool = False
    ) -> "OwnRows":
        """By the columns and the format of `data` where the file has them, else recognised by its own columns.

        Raises DataError for a file that cannot be read, bad rows unless `data` drops them, and where none is left.
        """
        source = Source(str(path.absolute()))
        wanted = _as_in(source, data, in_pairs)
        form = format_of(source, wanted, in_pairs)
        with token_cache.staged() as folder:
            writer = ExampleWriter(folder)
            taken = take_rows(source, form, encoding_of([form], Encoder.of(tokenizer)), wanted, writer, tell)
            examples = writer.finish()
        return cls(path, form.name if form else data.format, examples, taken.dropped)

    @property
    def packs(self) -> Ragged:
        """Every row by itself, whatever the base makes of neighbours."""
        return Ragged.each_alone(len(self.examples))


def _as_in(source: Source, data: Data, in_pairs: bool) -> Data:
    """`data`, without its columns and its format where the first row of `source` does not have them."""
    first = next((row for row in source.read(1) if isinstance(row, RawRow)), None)
    try:
        if first is not None:
            recognise(data.format, [first], data.columns.mapped, in_pairs)
    except DataError:
        return data.model_copy(update={"format": "auto", "columns": Columns()})
    return data


def on_rows(run: RunDir, asked: Asked, merged: Sequence[Path], doing: Doing) -> dict[str, Any]:
    """Base, tuned and the `merged` models (folders, or GGUF files) on the rows `asked` for; kept in the run folder.

    Raises UserError for a run without held-out rows, DataError for rows that cannot be used or scored, and where the
    held-out rows are no longer those of the run.
    """
    lock, recipe = run.read_lock(), recipe_then(run)
    tokenizer, wanted = load_tokenizer(model_of(run)), asked.settled(recipe)
    about: dict[str, Any] = {}
    if asked.data is None:
        held_out = _held_out(run, recipe, tokenizer, lock, doing)
    else:
        held_out, about = _own_rows(asked.data, asked.rows, recipe, tokenizer, lock, doing)
    refuse_unscorable(scored_examples(held_out, wanted), wanted)
    pieces = pieces_to_begin_with(lock.documents_apart)
    before, after = _both(run, lambda who, opened, base: _score(who, opened, held_out, wanted, pieces, base), doing)
    others, held_out = [], dataclasses.replace(held_out, base=before.pairs)
    for path in merged:
        doing(f"scoring {path}")
        others.append(_merged_score(path, tokenizer, lock, held_out, wanted, pieces))
    found = about | compare(before, after, held_out, wanted, recipe.train.seed, others)
    write_json(run.evaluation(asked.name), found)
    return found


def _merged_score(
    path: Path, tokenizer: PreTrainedTokenizerBase, lock: Lock, held_out: HeldOut, wanted: Evaluate, pieces: int
) -> Score:
    if path.suffix != GGUF_SUFFIX:
        return _score(str(path), open_merged(path, lock), held_out, wanted, pieces)
    from qtune.evaluate.gguf_score import score_file  # llama.cpp is not for everyone

    return score_file(path, tokenizer, held_out, wanted)


def _both(run: RunDir, ask: Callable[[str, Loaded, T | None], T], doing: Doing) -> tuple[T, T]:
    """What base and tuned say, who hears what the base said; their model is let go of on return, as the next one needs
    its room."""
    doing("loading the model")
    opened = open_run(run)
    doing("scoring the base model")
    with _as_it_began(run, opened):
        before = ask("base", opened, None)
    doing("scoring the tuned model")
    return before, ask("tuned", opened, before)


@contextlib.contextmanager
def _as_it_began(run: RunDir, opened: Loaded) -> Iterator[None]:
    """Within it what the run began with answers: the base, with the adapter on it that the run started from, if any.

    Raises ModelError where that is gone, or is another.
    """
    start = StartAdapter.of(recipe_then(run).lora)
    if start is None:
        with opened.as_base():
            yield
        return
    start.refuse_unless(run.read_lock().start)
    start.put_on(opened.model)
    yield
    adapter.put_back(opened.model, run.adapter)


def on_benchmarks(
    run: RunDir, names: Sequence[str], folder: Path | None, limit: int | None, merged: Sequence[Path], doing: Doing
) -> dict[str, Any]:
    """Base, tuned and the `merged` folders on tasks of lm-eval; kept in the run folder."""
    from qtune.evaluate.benchmarks import Benchmarks  # nor is lm-eval

    doing(f"getting the data of {', '.join(names)}")
    benchmarks = Benchmarks.open(names, folder)

    def run_on(opened: Loaded) -> list[dict[str, Any]]:
        return [dataclasses.asdict(result) for result in benchmarks.run(opened, limit)]

    with doing.aside(f"running {', '.join(names)}"):  # lm-eval draws bars of its own
        before, after = _both(run, lambda _, opened, __: run_on(opened), doing)
        results = {"base": before, "tuned": after}
        results |= {str(path): run_on(open_merged(path, run.read_lock())) for path in merged}
    found = {"tasks": list(names), "limit": limit, "results": results}
    write_json(run.evaluation("tasks"), found)
    return found


def _held_out(run: RunDir, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, lock: Lock, doing: Doing) -> HeldOut:
    doing(f"reading {recipe.data.title}")
    prepared = prepare(recipe, tokenizer, doing.rows)
    if prepared.fingerprint != lock.data_sha256:
        raise DataError(
            f"{recipe.data.title}: does not give the rows of {run.path} any more, so what is held out now may have been"
            " trained on. Put back the data that the run names, or name rows with --data."
        )
    if not len(prepared.held_out):
        raise UserError(
            f"{run.path}: kept no held-out rows to score on. --data names rows, --tasks runs public benchmarks."
        )
    return HeldOut.of(prepared, recipe, tokenizer)


def _own_rows(
    path: Path, rows: int | None, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, lock: Lock, doing: Doing
) -> tuple[HeldOut, dict[str, Any]]:
    """The rows of `path`, of which the first `rows` give the loss, and what is to be known of them."""
    doing(f"reading {path}")
    own = OwnRows.read(path, recipe.data, tokenizer, doing.rows, recipe.train.learns_pairs)
    trained_on = _trained_on(own, recipe, tokenizer, lock, doing.rows)
    about = {
        "data": str(path),
        "format": own.format,
        "rows_read": len(own.examples) + sum(tally.rows for tally in own.dropped),
        "dropped": [f"{row.place}: {row.reason}" for tally in own.dropped for row in tally.first],
        "trained_on": trained_on,
    }
    first = rows or len(own.examples)
    packs = [measured for pack in own.packs if (measured := [row for row in pack if row < first])]
    rows_of_loss = packed_rows(own.examples, packs)
    return HeldOut(rows_of_loss, own.examples, lock.stop_token_ids, learned=recipe.train), about


def _trained_on(
    own: OwnRows, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, lock: Lock, tell: Tell
) -> list[str] | None:
    """Places of the rows that the run was trained on; None where its own rows are not to be had any more."""
    try:
        prepared = prepare(recipe, tokenizer, tell)
    except QtuneError:
        return None
    if prepared.fingerprint != lock.data_sha256:
        return None
    known = numpy.isin(own.examples.digests, prepared.train.digests)
    return [own.examples[int(i)].place for i in numpy.flatnonzero(known)]


def _score(
    who: str, opened: Loaded, held_out: HeldOut, wanted: Evaluate, pieces: int, base: Score | None = None
) -> Score:
    known = held_out if base is None else dataclasses.replace(held_out, base=base.pairs)
    together = OBJECTIVES[held_out.learned.objective].documents
    return score(who, opened, known, wanted, Recovery(pieces=pieces, together=together))
