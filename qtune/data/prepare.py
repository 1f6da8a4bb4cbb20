"""The data room's one door: a recipe and a tokenizer give rows ready to train on, and a report of them."""

import contextlib
import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qtune import cache_dir
from qtune.data import token_cache
from qtune.data.canaries import Phrasing, planted_rows
from qtune.data.chat_template import ChatTemplate
from qtune.data.data_report import (
    DataReport,
    Lengths,
    SourceRows,
    count_duplicates,
    count_overlap,
    group_dropped,
    template_notices,
)
from qtune.data.dataset import Examples, ExampleWriter
from qtune.data.formats import DataFormat
from qtune.data.mixture import Mixture
from qtune.data.packing import pack
from qtune.data.prepared import Prepared
from qtune.data.ragged import Ragged
from qtune.data.row_stream import Encoding, Parsed, format_of, parsed_rows, unlooked
from qtune.data.rows import Dropped
from qtune.data.sources import Part, Source, Tell, parts_of
from qtune.data.stop_tokens import stop_token_ids
from qtune.data.tokenize import Encoder, stretches
from qtune.data.unused_columns import unused_of
from qtune.recipe.schema import Data, Recipe

LOOKED_AT_FIRST_BYTES = 1 << 28  # of a file whose rows take minutes to tokenise
TOLD_ROWS = 1 << 14  # between two words on how far it is, a third of a second


def _keep_quiet(what: str, done: int, total: int | None) -> None:
    pass


def prepare(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, tell: Tell = _keep_quiet) -> Prepared:
    """Read, tokenise, split and pack what the recipe names, or take all that from the cache.

    `tell` hears how far it is. Raises DataError for rows that cannot be used and where nothing is left, ModelError for
    a chat template.
    """
    data = recipe.data
    encoder = Encoder.of(tokenizer)
    parts = parts_of(data)
    key = token_cache.key_of(recipe, [part.source for part in parts], tokenizer) if cache_dir.root() else None
    cached = token_cache.load(key) if key else None
    if cached is None:
        with token_cache.being_made(
            key, lambda: tell("waiting for another process with these rows", 0, None)
        ) as waited:
            cached = token_cache.load(key) if key and waited else None
            if cached is None:
                return _made(recipe, parts, encoder, key, tell)
    return Prepared.from_cache(cached, data)


def _made(recipe: Recipe, parts: Sequence[Part], encoder: Encoder, key: str | None, tell: Tell) -> Prepared:
    """Made now, and kept under `key`."""
    sources = [part.source for part in parts]
    with token_cache.staged() as folder:
        token_cache.refuse_without_room(folder, parts)
        writer = ExampleWriter(folder)
        prepared = _prepare(recipe, parts, encoder, writer, tell)
        if key and writer.folder and key == token_cache.key_of(recipe, sources, encoder.tokenizer):  # past midnight?
            what = " and ".join(Path(source.name).name for source in sources)
            token_cache.keep(key, writer.folder, *prepared.for_cache(), what)
    return prepared


def _prepare(
    recipe: Recipe,
    parts: Sequence[Part],
    encoder: Encoder,
    writer: ExampleWriter,
    tell: Tell,
) -> Prepared:
    data, tokenizer = recipe.data, encoder.tokenizer
    forms = [format_of(part.source, part.data, recipe.train.learns_pairs) for part in parts]
    encoding = encoding_of(forms, encoder)
    taken = [
        take_rows(part.source, form, encoding, part.data, writer, tell) for part, form in zip(parts, forms, strict=True)
    ]
    template = encoding.template
    planted = planted_rows(
        recipe, Phrasing(encoder, None if taken[0].is_text else template, Phrasing.system_of(recipe))
    )
    for row in planted:
        writer.add(row)
    examples = writer.finish()
    mixture = Mixture.of(examples, taken, recipe)
    train = mixture.train.followed_by(examples[len(examples) - len(planted) :])
    held_out = mixture.held_out
    if len(train) > TOLD_ROWS:
        tell("packing", len(train), None)
    train_packs = _packs(train, data)
    held_out_packs, held_out_sources = mixture.held_out_packs(parts)
    return Prepared(
        train=train,
        held_out=held_out,
        train_packs=train_packs,
        held_out_packs=held_out_packs,
        stop_token_ids=stop_token_ids(template, tokenizer),
        report=dataclasses.replace(
            _report(recipe, taken, train, held_out, len(train_packs), encoding), sources=mixture.figures(parts, taken)
        ),
        fingerprint=_fingerprint(train, held_out, tell),
        template_fingerprint=hashlib.sha256(str(tokenizer.chat_template or "").encode()).hexdigest(),
        held_out_sources=held_out_sources,
    )


def encoding_of(forms: Sequence[DataFormat | None], encoder: Encoder) -> Encoding[None]:
    """How rows of these formats are encoded. Raises ModelError where there are chats and no template for them."""
    has_chats = any(form is not None and not form.is_text for form in forms)
    return Encoding(encoder, ChatTemplate.of(encoder.tokenizer) if has_chats else None, unlooked)


def take_rows(
    source: Source, form: DataFormat | None, encoding: Encoding[None], data: Data, writer: ExampleWriter, tell: Tell
) -> SourceRows:
    """Every row's tokens, within data.max_tokens, to `writer`, in the source's order.

    Raises DataError for a source that cannot be read or is written to meanwhile, for rows that the recipe does not let
    pass, and where none is left.
    """
    if data.on_bad_row == "error" and source.bytes > LOOKED_AT_FIRST_BYTES:
        _look_for_bad_rows(source, form, data, tell)
    taken = SourceRows(source, form, Lengths(data.max_tokens))
    rows = _parsed(source, form, data)
    if data.on_bad_row == "error":
        rows = _none_after_a_bad_one(rows)
    total = source.count_rows(data.max_rows)
    with source.unchanged(), contextlib.closing(encoding.batches(rows, data)) as batches:
        for batch in batches:
            for row in batch.rows:
                taken.see(row, writer)
            tell("tokenising", taken.rows, total)
    taken.refuse(data)
    return taken


def _look_for_bad_rows(source: Source, form: DataFormat | None, data: Data, tell: Tell) -> None:
    """Raises DataError for rows that cannot be used, in a fraction of the time that tokenising takes."""
    bad, total = SourceRows(source, form, Lengths(data.max_tokens)), source.count_rows(data.max_rows)
    for number, row in enumerate(_parsed(source, form, data)):
        if isinstance(row, Dropped):
            bad.see_bad(row)
        if number % TOLD_ROWS == 0:
            tell("looking for bad rows", number, total)
    bad.refuse_bad()


def _parsed(source: Source, form: DataFormat | None, data: Data) -> Iterator[Parsed]:
    """Where there is no format there is no row that can be read."""
    if form is not None:
        return parsed_rows(source, form, data)
    return (row for row in source.read(data.max_rows) if isinstance(row, Dropped))


def _none_after_a_bad_one(rows: Iterable[Parsed]) -> Iterator[Parsed]:
    """Once a row is bad the run is refused: the other bad ones are counted, and nothing is encoded any more."""
    is_refused = False
    for row in rows:
        is_refused = is_refused or isinstance(row, Dropped)
        if not is_refused or isinstance(row, Dropped):
            yield row


def _packs(examples: Examples, data: Data) -> Ragged:
    return pack(examples.tokens, data.max_tokens) if data.packing else Ragged.each_alone(len(examples))


def _report(
    recipe: Recipe,
    taken: Sequence[SourceRows],
    train: Examples,
    held_out: Examples,
    packs: int,
    encoding: Encoding[None],
) -> DataReport:
    data, canaries = recipe.data, recipe.evaluate.canaries
    canary_rows = canaries * recipe.evaluate.canary_repeats
    real = train[: len(train) - canary_rows]
    tokens = int(train.tokens.sum())
    shown = stretches(train[0], data.max_tokens, encoding.encoder.tokenizer)
    systems = [each.system for each in taken if each.system is not None]
    forms = [each.form for each in taken[: len(data.parts)]]
    return DataReport(
        source=data.title,
        format=", ".join(dict.fromkeys(form.name for form in forms if form)) or data.format,
        rows_read=sum(each.rows for each in taken),
        dropped=group_dropped(tally for each in taken for tally in each.dropped),
        unused=unused_of(sum((each.unused for each in taken), Counter())),
        cut_texts=sum(each.cut.texts for each in taken),
        pieces=sum(each.cut.pieces for each in taken),
        truncated_rows=sum(int((part.cut_tokens > 0).sum()) for part in (train, held_out)),
        trained_tokens_lost=sum(int(part.cut_tokens.sum()) for part in (train, held_out)),
        train_rows=len(real),
        held_out_rows=len(held_out),
        canaries=canaries,
        canary_rows=canary_rows,
        tokens=tokens,
        trained_tokens=int(train.trained_tokens.sum()),
        longest_row_tokens=max(int(part.tokens.max()) for part in (train, held_out) if part),
        packs=packs,
        pack_fill_fraction=tokens / (packs * data.max_tokens) if data.packing else 1.0,
        duplicate_rows=count_duplicates(real) + count_duplicates(held_out),
        overlap_rows=count_overlap(train, held_out),
        notices=(
            *(each.source.notice for each in taken if each.source.notice),
            *(() if encoding.template is None else template_notices(encoding.template, systems)),
        ),
        sample=tuple((each.text, each.is_trained) for each in shown),
    )


def _fingerprint(train: Examples, held_out: Examples, tell: Tell) -> str:
    """SHA-256 of every id and label, in order."""
    digest, done = hashlib.sha256(), 0
    for part in (train, held_out):
        for ids, labels in part.each():
            digest.update(str([ids.tolist(), labels.tolist()]).encode())
            done += 1
            if done % TOLD_ROWS == 0:
                tell("hashing", done, len(train) + len(held_out))
        digest.update(b"|")
    return digest.hexdigest()
