"""The data room's one door: a recipe and a tokenizer give rows ready to train on, and a report of them."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from qtune.data import token_cache
from qtune.data.canaries import Phrasing, planted_rows
from qtune.data.chat_template import ChatTemplate
from qtune.data.data_report import DataReport, count_duplicates, count_overlap, group_dropped, template_notices
from qtune.data.dataset import Examples, ExampleWriter
from qtune.data.held_out_split import held_out_of
from qtune.data.packing import pack
from qtune.data.prepared import Prepared
from qtune.data.scan import Survey, Tell, survey
from qtune.data.sources import Source
from qtune.data.stop_tokens import stop_token_ids
from qtune.data.token_cache_key import key_of
from qtune.data.tokenize import Encoder, stretches
from qtune.data.tokenize_dataset import Tokenised, tokenise
from qtune.data.unused_columns import unused_of
from qtune.recipe.schema import Data, Recipe


def _keep_quiet(what: str, done: int, total: int | None) -> None:
    pass


def prepare(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, tell: Tell = _keep_quiet) -> Prepared:
    """Read, tokenise, split and pack what the recipe names, or take all that from the cache.

    `tell` hears how far it is. Raises DataError for rows that cannot be used and where nothing is left, ModelError for
    a chat template.
    """
    data = recipe.data
    encoder = Encoder.of(tokenizer)
    sources = [source for source in (Source.of_train(data), Source.of_held_out(data)) if source is not None]
    key = key_of(recipe, sources, tokenizer) if token_cache.folder() else None
    entry = token_cache.load(key) if key else None
    if entry is not None:
        return Prepared.of_entry(entry, data.train)
    with token_cache.staged() as folder:
        writer = ExampleWriter(folder)
        prepared = _prepare(recipe, sources, encoder, writer, tell)
        if key and writer.folder and key == key_of(recipe, sources, tokenizer):  # no file changed meanwhile
            token_cache.keep(key, writer.folder, *prepared.as_entry())
    return prepared


def _prepare(
    recipe: Recipe,
    sources: Sequence[Source],
    encoder: Encoder,
    writer: ExampleWriter,
    tell: Tell,
) -> Prepared:
    data, tokenizer = recipe.data, encoder.tokenizer
    surveys = [survey(source, data, tell) for source in sources]
    template = ChatTemplate.of(tokenizer) if any(found.has_chats for found in surveys) else None
    advance = _counted(tell, sum(found.usable_rows for found in surveys))
    parts = [tokenise(found, template, encoder, writer, advance) for found in surveys]
    phrasing = Phrasing(encoder, template if surveys[0].has_chats else None, data.system)
    planted = planted_rows(recipe, phrasing)
    for row in planted:
        writer.add(row)
    examples = writer.finish()
    rows = len(examples) - len(planted)
    real, held_out = _parted(examples[:rows], parts, not surveys[0].has_chats, recipe)
    train = real.followed_by(examples[rows:])
    train_packs = _packs(train, data)
    return Prepared(
        train=train,
        held_out=held_out,
        train_packs=train_packs,
        held_out_packs=_packs(held_out, data),
        stop_token_ids=stop_token_ids(template, tokenizer),
        report=_report(recipe, surveys, parts, train, held_out, len(train_packs), template, tokenizer),
        fingerprint=_fingerprint(train, held_out),
        template_fingerprint=hashlib.sha256(str(tokenizer.chat_template or "").encode()).hexdigest(),
    )


def _counted(tell: Tell, total: int) -> Callable[[int], None]:
    done = 0

    def advance(rows: int) -> None:
        nonlocal done
        done += rows
        tell("tokenising", done, total)

    return advance


def _parted(examples: Examples, parts: Sequence[Tokenised], is_text: bool, recipe: Recipe) -> tuple[Examples, Examples]:
    """Train and held-out rows, both in file order."""
    if recipe.data.held_out is not None:
        return examples[: parts[0].rows], examples[parts[0].rows :]
    apart = held_out_of(len(examples), is_text, recipe.data, recipe.train.seed)
    kept = set(range(len(examples))).difference(apart)
    return examples.take(sorted(kept)), examples.take(apart)


def _packs(examples: Examples, data: Data) -> tuple[tuple[int, ...], ...]:
    if not data.packing:
        return tuple((i,) for i in range(len(examples)))
    return tuple(pack(examples.tokens.tolist(), data.max_tokens))


def _report(
    recipe: Recipe,
    surveys: Sequence[Survey],
    parts: Sequence[Tokenised],
    train: Examples,
    held_out: Examples,
    packs: int,
    template: ChatTemplate | None,
    tokenizer: PreTrainedTokenizerBase,
) -> DataReport:
    data, canaries = recipe.data, recipe.evaluate.canaries
    canary_rows = canaries * recipe.evaluate.canary_repeats
    real = train[: len(train) - canary_rows]
    tokens = int(train.tokens.sum())
    systems = [found.system for found in surveys if found.system is not None]
    return DataReport(
        source=data.train,
        format=surveys[0].form.name if surveys[0].form else data.format,
        rows_read=sum(found.rows_read for found in surveys),
        dropped=group_dropped([row for part in parts for row in part.dropped]),
        unused=unused_of(sum((found.unused for found in surveys), Counter())),
        cut_texts=sum(part.cut.texts for part in parts),
        pieces=sum(part.cut.pieces for part in parts),
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
            *(found.source.notice for found in surveys if found.source.notice),
            *(() if template is None else template_notices(template, systems)),
        ),
        sample=tuple((each.text, each.is_trained) for each in stretches(train[0], data.max_tokens, tokenizer)),
    )


def _fingerprint(train: Examples, held_out: Examples) -> str:
    """SHA-256 of every id and label, in order."""
    digest = hashlib.sha256()
    for part in (train, held_out):
        for ids, labels in part.each():
            digest.update(json.dumps([ids.tolist(), labels.tolist()]).encode())
        digest.update(b"|")
    return digest.hexdigest()
