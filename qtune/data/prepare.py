"""The data room's one door: a recipe and a tokenizer give rows ready to train on, and a report of them."""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from qtune.data import formats
from qtune.data.check import DataReport, count_duplicates, count_overlap, group_dropped, template_notices
from qtune.data.formats import Conversation, Document
from qtune.data.packing import pack
from qtune.data.rows import SHOWN_FAULTS, Dropped, read_rows, refuse_bad_rows
from qtune.data.template import ChatTemplate
from qtune.data.tokens import NOT_TRAINED, Encoder, Example, fit, tokenize
from qtune.errors import DataError
from qtune.recipe.schema import Data, Recipe


@dataclass(frozen=True)
class Prepared:
    """Tokenised rows, how they are packed (indices into them), and what identifies them."""

    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    train_packs: tuple[tuple[int, ...], ...]
    held_out_packs: tuple[tuple[int, ...], ...]
    stop_token_ids: tuple[int, ...]
    report: DataReport
    fingerprint: str
    template_fingerprint: str


@dataclass(frozen=True)
class Source:
    """What one source held: rows read as its format has them, and those that are no use."""

    name: str
    format: str
    items: tuple[Conversation | Document, ...]
    dropped: tuple[Dropped, ...]

    @property
    def rows_read(self) -> int:
        return len(self.items) + len(self.dropped)


@dataclass(frozen=True)
class Tokenised:
    """A source's rows as examples, in its order, and all of its rows that were left out."""

    examples: tuple[Example, ...]
    dropped: tuple[Dropped, ...]


def prepare(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """Read, tokenise, split and pack what the recipe names.

    Raises DataError for rows that cannot be used and where nothing is left, ModelError for a chat template.
    """
    data = recipe.data
    sources = [_read(data.train, data.train_split, data)]
    if data.held_out is not None:
        sources.append(_read(data.held_out, data.held_out_split, data))
    chats = any(isinstance(item, Conversation) for source in sources for item in source.items)
    template, encoder = ChatTemplate.of(tokenizer) if chats else None, Encoder.of(tokenizer)
    parts = [_tokenise(source, data, template, encoder) for source in sources]
    if data.held_out is not None:
        train, held_out = parts[0].examples, parts[1].examples
    else:
        train, held_out = _split(parts[0].examples, data.held_out_fraction, recipe.train.seed)
    packs = _packs(train, data)
    return Prepared(
        train=train,
        held_out=held_out,
        train_packs=packs,
        held_out_packs=_packs(held_out, data),
        stop_token_ids=_stop_token_ids(template, tokenizer),
        report=_report(data, sources, parts, train, held_out, len(packs), template, tokenizer),
        fingerprint=_fingerprint(train, held_out),
        template_fingerprint=hashlib.sha256(str(tokenizer.chat_template or "").encode()).hexdigest(),
    )


def _read(name: str, split: str, data: Data) -> Source:
    raw = read_rows(name, split, data.subset, data.max_rows, data.on_bad_row)
    if not raw.rows:
        return Source(name, data.format, (), raw.dropped)
    try:
        form = formats.recognise(data.format, raw.rows, data.columns)
    except DataError as fault:
        raise DataError(f"{name}: {fault}") from None
    read = [formats.read(row, form, data.columns, data.system) for row in raw.rows]
    unusable = tuple(item for item in read if isinstance(item, Dropped))
    if data.on_bad_row == "error":
        refuse_bad_rows(unusable)
    items = tuple(item for item in read if not isinstance(item, Dropped))
    return Source(name, form, items, (*raw.dropped, *unusable))


def _tokenise(source: Source, data: Data, template: ChatTemplate | None, encoder: Encoder) -> Tokenised:
    """Every row's tokens, within data.max_tokens. Raises DataError where the recipe wants that, or none is left."""
    whole = tokenize(source.items, template, encoder)
    untraceable = [item for item in whole if isinstance(item, Dropped)]
    if data.on_bad_row == "error":
        refuse_bad_rows(untraceable)
    rows = [item for item in whole if isinstance(item, Example)]
    if data.on_long == "error":
        _refuse_long_rows(rows, data.max_tokens)
    fitted = [fit(row, data.max_tokens, is_cut=data.on_long == "truncate") for row in rows]
    examples = tuple(item for item in fitted if isinstance(item, Example))
    dropped = (*source.dropped, *untraceable, *(item for item in fitted if isinstance(item, Dropped)))
    if not examples:
        raise DataError(_nothing_left_message(source.name, dropped, rows))
    return Tokenised(examples, dropped)


def _refuse_long_rows(rows: Sequence[Example], max_tokens: int) -> None:
    long = [row for row in rows if len(row.input_ids) > max_tokens]
    if not long:
        return
    named = [f"{row.place}: has {len(row.input_ids):,} tokens." for row in long[:SHOWN_FAULTS]]
    longest = max(len(row.input_ids) for row in long)
    raise DataError(
        "\n".join(named) + f"\n{len(long):,} of {len(rows):,} rows have more than data.max_tokens = {max_tokens:,}, the"
        f' longest {longest:,}. Raise it, or choose data.on_long = "drop" or "truncate".'
    )


def _nothing_left_message(source: str, dropped: Sequence[Dropped], rows: Sequence[Example]) -> str:
    reason = group_dropped(dropped)[0]
    message = f"{source}: no row can be used. {reason.rows:,} of {len(dropped):,} rows: {reason.reason}."
    if rows:
        message += f" The shortest row has {min(len(row.input_ids) for row in rows):,} tokens: raise data.max_tokens."
    return message


def _split(
    examples: tuple[Example, ...], fraction: float, seed: int
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Train and held-out rows, both in file order; at least one row is held out where a share was asked for."""
    if fraction == 0:
        return examples, ()
    count = max(1, round(fraction * len(examples)))
    if count >= len(examples):
        raise DataError(
            f"data.held_out_fraction = {fraction:g} leaves nothing to train on: usable rows are {len(examples)}. Lower"
            " it, add rows, or name a data.held_out file."
        )
    apart = set(random.Random(seed).sample(range(len(examples)), count))
    train = tuple(example for i, example in enumerate(examples) if i not in apart)
    return train, tuple(examples[i] for i in sorted(apart))


def _packs(examples: Sequence[Example], data: Data) -> tuple[tuple[int, ...], ...]:
    if not data.packing:
        return tuple((i,) for i in range(len(examples)))
    return tuple(pack([len(example.input_ids) for example in examples], data.max_tokens))


def _stop_token_ids(template: ChatTemplate | None, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What ends an answer. Documents end with the tokenizer's end of sequence."""
    if template is not None:
        return template.stop_token_ids
    return () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)


def _report(
    data: Data,
    sources: Sequence[Source],
    parts: Sequence[Tokenised],
    train: Sequence[Example],
    held_out: Sequence[Example],
    packs: int,
    template: ChatTemplate | None,
    tokenizer: PreTrainedTokenizerBase,
) -> DataReport:
    examples = [*train, *held_out]
    tokens = sum(len(example.input_ids) for example in train)
    return DataReport(
        source=data.train,
        format=sources[0].format,
        rows_read=sum(source.rows_read for source in sources),
        dropped=group_dropped([row for part in parts for row in part.dropped]),
        truncated_rows=sum(example.cut_tokens > 0 for example in examples),
        trained_tokens_lost=sum(example.cut_tokens for example in examples),
        train_rows=len(train),
        held_out_rows=len(held_out),
        tokens=tokens,
        trained_tokens=sum(example.trained_tokens for example in train),
        longest_row_tokens=max(len(example.input_ids) for example in examples),
        packs=packs,
        pack_fill_fraction=tokens / (packs * data.max_tokens) if data.packing else 1.0,
        duplicate_rows=count_duplicates(train),
        overlap_rows=count_overlap(train, held_out),
        notices=() if template is None else template_notices(template, [item for s in sources for item in s.items]),
        sample=_sample(train[0], tokenizer),
    )


def _sample(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[str, bool], ...]:
    """The row as the model sees it, special tokens shown, in stretches that are trained or not."""
    stretches: list[tuple[list[int], bool]] = []
    for position, (token, label) in enumerate(zip(example.input_ids, example.labels, strict=True)):
        trained = position > 0 and label != NOT_TRAINED
        if not stretches or stretches[-1][1] != trained:
            stretches.append(([], trained))
        stretches[-1][0].append(token)
    return tuple((tokenizer.decode(ids), trained) for ids, trained in stretches)


def _fingerprint(train: Sequence[Example], held_out: Sequence[Example]) -> str:
    """SHA-256 of every id and label, in order."""
    digest = hashlib.sha256()
    for part in (train, held_out):
        for example in part:
            digest.update(json.dumps([example.input_ids, example.labels]).encode())
        digest.update(b"|")
    return digest.hexdigest()
