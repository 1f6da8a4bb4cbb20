"""What both models are asked, which rows are answered, and which could not be scored.

It loads no model, so that rows are read without one.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from qtune.data.chat_template import ChatTemplate
from qtune.data.dataset import ExampleWriter
from qtune.data.formats import Message
from qtune.data.packing import PackedRow, PackedRows, pack, packed_rows
from qtune.data.prepare import prepare
from qtune.data.prepared import Prepared
from qtune.data.rows import Document, Dropped, Example
from qtune.data.sources import Tell
from qtune.data.tokenize import Encoder, fit, prompt_of, tokenize
from qtune.errors import DataError, ModelError
from qtune.evaluate.metrics import METRICS, FaultOf
from qtune.model.tokenizer import load_tokenizer
from qtune.recipe.error_messages import shown
from qtune.recipe.schema import Evaluate, Recipe, Train
from qtune.units import counted

if TYPE_CHECKING:
    from qtune.evaluate.held_out_pairs import PairLogs

BUILTIN = Path(__file__).with_name("general.txt")
MOST_TOKENS = 8192  # about a second of an 8-billion model on a card; enough for a loss that is sure to 0.02 nats
LEARNED_ALONE = Train()  # each row by itself
SHOWN_ROWS = 3  # of those that cannot be scored; they mostly have one fault in common


@dataclass(frozen=True)
class Watched:
    """A prompt that is answered at every held-out loss, as written and as the model sees it."""

    text: str
    ids: Sequence[int]


@dataclass(frozen=True)
class HeldOut:
    """What both models are asked: packed rows for the loss of what is `learned`, examples for the score, and general
    text where wanted. `base` is what the base made of pairs, once that is known; `sources` names that of each pack
    where there are several."""

    packs: Sequence[PackedRow]
    examples: Sequence[Example]
    stop_token_ids: Sequence[int]
    general: Sequence[PackedRow] | None = None
    learned: Train = LEARNED_ALONE
    base: "Sequence[PairLogs]" = ()
    watched: Sequence[Watched] = ()
    sources: tuple[str, ...] = ()

    @classmethod
    def of(cls, prepared: Prepared, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> "HeldOut":
        """Raises DataError for a text in `evaluate.general` that cannot be measured, and for prompts to watch that are
        not there or that the chat template does not take."""
        packs = packed_rows(prepared.held_out, prepared.held_out_packs)
        general = general_packs(recipe.evaluate.general, tokenizer, recipe.data.max_tokens)
        watched, sources = tuple(_watched(prepared.held_out, recipe, tokenizer)), prepared.held_out_sources
        asked = (packs, prepared.held_out, prepared.stop_token_ids)
        return cls(*asked, general, recipe.train, watched=watched, sources=sources)


def _watched(held_out: Sequence[Example], recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Iterator[Watched]:
    """The prompts of `evaluate.watch`: those of the first held-out rows that ask something, or the recipe's own."""
    wanted = recipe.evaluate.watch
    if isinstance(wanted, int):
        asking = (row for row in held_out if row.prompt_ids) if wanted else ()
        rows = list(itertools.islice(asking, wanted))
        if len(rows) < wanted:
            raise DataError(
                f"evaluate.watch: is {wanted}, and {counted(len(rows), 'held-out row')} can be asked. Ask for no more,"
                " or write prompts of your own."
            )
        yield from (Watched(row.prompt_text, row.prompt_ids) for row in rows)
        return
    encoder = Encoder.of(tokenizer)
    template = ChatTemplate.of(tokenizer) if tokenizer.chat_template else None
    system = [Message("system", recipe.data.system)] if recipe.data.system else []
    for prompt in wanted:
        if template is None:
            yield Watched(prompt, encoder.with_one_bos(encoder.rows([[prompt]])[0][0]))
            continue
        try:
            yield Watched(prompt, prompt_of([*system, Message("user", prompt)], template, encoder))
        except ModelError as fault:
            raise DataError(f"evaluate.watch: {shown(prompt)} cannot be asked ({fault})") from None


def scored_examples(held_out: HeldOut, wanted: Evaluate) -> list[Example]:
    """The rows that are answered: those with a prompt, up to `rows`, none without a metric."""
    if wanted.metric == "none":
        return []
    return list(itertools.islice((example for example in held_out.examples if example.prompt_ids), wanted.rows))


def fault_asked(wanted: Evaluate) -> FaultOf | None:
    """Why an answer to a row could not be scored, for a metric that wants more of it than a reference; None for others,
    and where no row is scored."""
    metric = METRICS.get(wanted.metric)
    return metric.fault_of if metric and wanted.rows else None


def refuse_unscorable(asked: Sequence[Example], wanted: Evaluate) -> None:
    """Raises DataError with the first of the rows whose answers the metric could not score, and why not.

    Asked before anything is trained: a check that cannot be read would otherwise be found hours later.
    """
    fault_of = fault_asked(wanted)
    faulty = [(row.place, fault) for row in asked if fault_of and (fault := fault_of(row)) is not None]
    if not faulty:
        return
    named = [f"{place}: {fault}." for place, fault in faulty[:SHOWN_ROWS]]
    count = f"{len(faulty):,} of {len(asked):,} held-out rows" if len(faulty) > 1 else "This row"
    raise DataError("\n".join([*named, f'{count} cannot be scored by evaluate.metric = "{wanted.metric}".']))


@dataclass(frozen=True)
class Read:
    """A recipe's data as it is to a run: rows as the model is to see them, and what both models will be asked."""

    tokenizer: PreTrainedTokenizerBase
    prepared: Prepared
    held_out: HeldOut


def read_rows(recipe: Recipe, tell: Tell) -> Read:
    """Raises a UserError for rows that could not be trained on, or not be scored afterwards."""
    tokenizer = load_tokenizer(recipe.model)
    prepared = prepare(recipe, tokenizer, tell)
    held_out = HeldOut.of(prepared, recipe, tokenizer)
    refuse_unscorable(scored_examples(held_out, recipe.evaluate), recipe.evaluate)
    return Read(tokenizer, prepared, held_out)


def general_packs(wanted: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> PackedRows | None:
    """Up to MOST_TOKENS of the text that `evaluate.general` names, in packs of `max_tokens`; None where it is "none".

    Every line is a document; one that is longer than a pack is cut. Raises DataError for a file without text.
    """
    if wanted == "none":
        return None
    path = BUILTIN if wanted == "builtin" else Path(wanted)
    writer, held = ExampleWriter(None), 0
    for example in tokenize(_documents(path), None, Encoder.of(tokenizer)):
        fitted = example if isinstance(example, Dropped) else fit(example, max_tokens, is_cut=True)
        if isinstance(fitted, Dropped):
            continue
        held += len(fitted.input_ids)
        if held > MOST_TOKENS:
            break
        writer.add(fitted)
    examples = writer.finish()
    if not len(examples):
        raise DataError(f'{path}: evaluate.general holds no text to measure with. Name another, or set it to "none".')
    return packed_rows(examples, pack(examples.tokens, max_tokens))


def _documents(path: Path) -> list[Document]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as fault:
        raise DataError(f"{path}: evaluate.general cannot be read as UTF-8 text ({fault}).") from None
    return [Document(line, f"{path.name}:{number:,}") for number, line in enumerate(lines, 1) if line.strip()]
