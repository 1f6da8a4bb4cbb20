"""The data room's one door: a recipe and a tokenizer give rows ready to train on, and a report of them."""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from qtune.data import formats
from qtune.data.check import DataReport, count_duplicates, count_overlap, group_dropped
from qtune.data.packing import pack
from qtune.data.rows import Dropped, Row, read_rows, refuse_bad_rows
from qtune.data.template import ChatTemplate
from qtune.data.tokens import NOT_TRAINED, Encoder, Example, tokenize
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
    """Rows of one source, tokenised: `examples` in the source's order, and what was left out."""

    examples: tuple[Example, ...]
    dropped: tuple[Dropped, ...]
    rows_read: int
    format: str


def prepare(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """Read, tokenise, split and pack what the recipe names. Raises DataError where nothing is left to train on."""
    data = recipe.data
    main = _read(data.train, data.train_split, data, tokenizer)
    if data.held_out is not None:
        apart = _read(data.held_out, data.held_out_split, data, tokenizer)
        train, held_out = main.examples, apart.examples
    else:
        apart = Source((), (), 0, main.format)
        train, held_out = _split(main.examples, data.held_out_fraction, recipe.train.seed)
    train_packs, held_out_packs = _packs(train, data), _packs(held_out, data)
    return Prepared(
        train=train,
        held_out=held_out,
        train_packs=train_packs,
        held_out_packs=held_out_packs,
        stop_token_ids=_stop_token_ids(main, tokenizer),
        report=_report(data, main, apart, train, held_out, len(train_packs), tokenizer),
        fingerprint=_fingerprint(train, held_out),
        template_fingerprint=hashlib.sha256((tokenizer.chat_template or "").encode()).hexdigest(),
    )


def _read(source: str, split: str, data: Data, tokenizer: PreTrainedTokenizerBase) -> Source:
    raw = read_rows(source, split, data.subset, data.max_rows, data.on_bad_row)
    name = _recognise(source, raw.rows[0], data) if data.format == "auto" and raw.rows else data.format
    items = [formats.read(row, name, data.columns, data.system) for row in raw.rows]
    unusable = [item for item in items if isinstance(item, Dropped)]
    if data.on_bad_row == "error":
        refuse_bad_rows(unusable)
    usable = [item for item in items if not isinstance(item, Dropped)]
    template = ChatTemplate.of(tokenizer) if any(isinstance(item, formats.Conversation) for item in usable) else None
    encoder = Encoder.of(tokenizer)
    tokenised = [tokenize(item, template, encoder, data.max_tokens, data.on_long) for item in usable]
    examples = tuple(item for item in tokenised if isinstance(item, Example))
    long = [item for item in tokenised if isinstance(item, Dropped)]
    if data.on_long == "error" and long:
        raise DataError(_too_long_message(long, data))
    if not examples:
        raise DataError(_nothing_left_message(source, [*raw.dropped, *unusable, *long], usable, template, encoder))
    return Source(examples, (*raw.dropped, *unusable, *long), len(raw.rows) + len(raw.dropped), name)


def _recognise(source: str, row: Row, data: Data) -> str:
    try:
        return formats.recognise(row.values.keys(), data.columns)
    except DataError as fault:
        raise DataError(f"{source}: {fault}") from None


def _too_long_message(long: Sequence[Dropped], data: Data) -> str:
    first = long[0]
    more = f" {len(long) - 1:,} more rows like it." if len(long) > 1 else ""
    return (
        f'{first.place}: {first.reason}.{more} Raise it, or choose data.on_long = "truncate" or "drop"'
        f" (now {data.on_long!r})."
    )


def _nothing_left_message(
    source: str,
    dropped: Sequence[Dropped],
    usable: Sequence[formats.Conversation | formats.Document],
    template: ChatTemplate | None,
    encoder: Encoder,
) -> str:
    reason = group_dropped(dropped)[0]
    message = f"{source}: no row is left to train on. {reason.rows:,} of {len(dropped):,} rows: {reason.reason}."
    if usable and "longer than" in reason.reason:
        whole = (tokenize(item, template, encoder, 2**40, "drop") for item in usable)
        shortest = min(len(item.input_ids) for item in whole if isinstance(item, Example))
        message += f" The shortest has {shortest:,} tokens: data.max_tokens must be at least that."
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
            f"data.held_out_fraction = {fraction:g} leaves none of the {len(examples)} usable rows to train on. Lower"
            " it, add rows, or name a data.held_out file."
        )
    apart = set(random.Random(seed).sample(range(len(examples)), count))
    train = tuple(example for i, example in enumerate(examples) if i not in apart)
    return train, tuple(examples[i] for i in sorted(apart))


def _packs(examples: Sequence[Example], data: Data) -> tuple[tuple[int, ...], ...]:
    if not data.packing:
        return tuple((i,) for i in range(len(examples)))
    return tuple(pack([len(example.input_ids) for example in examples], data.max_tokens))


def _stop_token_ids(main: Source, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What ends an answer. Documents end with the tokenizer's end of sequence."""
    if main.format != "text":
        return ChatTemplate.of(tokenizer).stop_token_ids
    return () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)


def _report(
    data: Data,
    main: Source,
    apart: Source,
    train: Sequence[Example],
    held_out: Sequence[Example],
    packs: int,
    tokenizer: PreTrainedTokenizerBase,
) -> DataReport:
    examples = [*train, *held_out]
    tokens = sum(len(example.input_ids) for example in train)
    return DataReport(
        source=data.train,
        format=main.format,
        rows_read=main.rows_read + apart.rows_read,
        dropped=group_dropped([*main.dropped, *apart.dropped]),
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
        notices=_notices(data, main, tokenizer),
        sample=_sample(train[0], tokenizer),
    )


def _notices(data: Data, main: Source, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    if main.format == "text" or data.system is None or ChatTemplate.of(tokenizer).takes_system:
        return ()
    return ("The chat template knows no system prompt, so it stands before the first question.",)


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
