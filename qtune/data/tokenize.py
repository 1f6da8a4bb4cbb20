"""Conversations and documents become token ids and labels."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from qtune.data.chat_template import ChatTemplate, Piece, special_tokens
from qtune.data.formats import Message, RowFault, thoughts
from qtune.data.formats.tool_calls import as_text
from qtune.data.rows import NOT_TRAINED, Conversation, Document, Dropped, Example
from qtune.data.template_process import Untraceable
from qtune.errors import ModelError

T = TypeVar("T")

BATCH_TEXTS, BATCH_CHARACTERS = 1024, 1 << 20  # enough for every core; the tokenizer holds 100 bytes a token of these


@dataclass(frozen=True)
class Encoder:
    """Text to ids, piece by piece, with exactly one BOS at the start of a row where the tokenizer has one."""

    tokenizer: PreTrainedTokenizerBase
    special_tokens: tuple[str, ...]
    guard: str
    bos_id: int | None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "Encoder":
        bos = tokenizer.bos_token_id
        adds_bos = bos is not None and tokenizer("x")["input_ids"][:1] == [bos]
        guard = tokenizer.bos_token or tokenizer.eos_token or ""
        return cls(tokenizer, special_tokens(tokenizer), guard, bos if adds_bos else None)

    def rows(self, rows: Sequence[Sequence[str]]) -> list[list[list[int]]]:
        """Ids of every text of every row, each tokenised as it stands in its row, but never across its borders.

        A tokenizer may put a space before the first word of a text, or take the white space after a special token. So
        a text is tokenised behind the special token that stands before it, whose id is taken off again; behind plain
        text, any special token keeps it from being a beginning.
        """
        texts = [(guard, text) for row in rows for guard, text in zip(self._guards(row), row, strict=True)]
        ids = self._encode(texts)
        return [[next(ids) for _ in row] for row in rows]

    def _guards(self, row: Sequence[str]) -> list[str]:
        return ["", *(self._special_end(text) or self.guard for text in row[:-1])]

    def _special_end(self, text: str) -> str | None:
        if not text.endswith(self.special_tokens):
            return None
        return next(token for token in self.special_tokens if text.endswith(token))

    def _encode(self, texts: Sequence[tuple[str, str]]) -> Iterator[list[int]]:
        """Half of the texts are what a template writes around every answer: each is encoded once a batch."""
        for batch in batches_of(texts, lambda pair: len(pair[1])):
            different = list(dict.fromkeys(batch))
            encoded = self.tokenizer(
                [guard + text for guard, text in different], add_special_tokens=False, return_attention_mask=False
            )["input_ids"]
            known = {pair: ids[1:] if pair[0] else ids for pair, ids in zip(different, encoded, strict=True)}
            yield from map(known.__getitem__, batch)

    def with_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a text that begins a row, and the characters of each; no spans where the tokenizer knows none."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=self.tokenizer.is_fast)
        return encoded["input_ids"], encoded.get("offset_mapping", [])

    def end_of(self, item: Document) -> list[int]:
        """What follows a document: the end of sequence, unless it goes on or the tokenizer has none."""
        end = self.tokenizer.eos_token_id
        return [] if item.continues or end is None else [end]

    def with_one_bos(self, ids: list[int]) -> list[int]:
        """`ids` with the BOS the tokenizer would add; a template that wrote one, or two, keeps one."""
        bos = self.tokenizer.bos_token_id
        while bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]
        return [self.bos_id, *ids] if self.bos_id is not None and ids[:1] != [self.bos_id] else ids


@dataclass(frozen=True)
class Stretch:
    """Text of tokens in a row that share a fate; `is_cut` where they stand behind data.max_tokens, `is_thought` where
    `with_thoughts` saw one."""

    text: str
    is_trained: bool
    is_cut: bool
    is_thought: bool = False


def stretches(row: Example, max_tokens: int, tokenizer: PreTrainedTokenizerBase) -> tuple[Stretch, ...]:
    """The row's tokens as text, special ones included; the first token is never predicted, so never trained."""

    def fate(position: int) -> tuple[bool, bool]:
        return position > 0 and row.labels[position] != NOT_TRAINED, position >= max_tokens

    return tuple(
        Stretch(tokenizer.decode([row.input_ids[position] for position in positions]), *shared)
        for shared, positions in groupby(range(len(row.input_ids)), fate)
    )


def with_thoughts(every: Sequence[Stretch]) -> tuple[Stretch, ...]:
    """The same, cut where thoughts begin and end, by the tags around them."""
    whole = "".join(stretch.text for stretch in every)
    spans = [match.span() for match in thoughts.ANY.finditer(whole)]
    borders, parts, at = {border for span in spans for border in span}, [], 0
    for stretch in every:
        end = at + len(stretch.text)
        cuts = sorted({at, end, *(border for border in borders if at < border < end)})
        for start, until in itertools.pairwise(cuts):
            is_thought = any(first <= start < last for first, last in spans)
            parts.append(dataclasses.replace(stretch, text=whole[start:until], is_thought=is_thought))
        at = end
    return tuple(parts)


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of everything that turns text into ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    whole = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()


def characters_of(item: Conversation | Document | Dropped) -> int:
    if isinstance(item, Dropped):
        return 0
    if isinstance(item, Document):
        return len(item.text)
    messages = item.messages + item.rejected
    called = sum(len(call.arguments) for message in messages for call in message.calls)
    return called + len(item.tools) + sum(len(message.content) + len(message.thought) for message in messages)


def batches_of(items: Iterable[T], characters: Callable[[T], int]) -> Iterator[list[T]]:
    """`items` in lists of up to BATCH_TEXTS, which end early with the item that brings BATCH_CHARACTERS together."""
    batch: list[T] = []
    held = 0
    for item in items:
        batch.append(item)
        held += characters(item)
        if len(batch) >= BATCH_TEXTS or held >= BATCH_CHARACTERS:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def tokenize(
    items: Sequence[Conversation | Document], template: ChatTemplate | None, encoder: Encoder
) -> list[Example | Dropped]:
    """Every row as ids and labels, or why it is not used. `template` is only asked for conversations."""
    rejected = [
        dataclasses.replace(item, messages=item.rejected, rejected=())
        for item in items
        if isinstance(item, Conversation) and item.rejected
    ]
    if not rejected:
        return _tokenized(items, template, encoder)
    every = iter(_tokenized([*items, *rejected], template, encoder))
    first = list(itertools.islice(every, len(items)))
    return [
        _pair(row, next(every)) if isinstance(item, Conversation) and item.rejected else row
        for item, row in zip(items, first, strict=True)
    ]


def _pair(chosen: Example | Dropped, rejected: Example | Dropped) -> Example | Dropped:
    """Both behind one another, in one row."""
    for row in (chosen, rejected):
        if isinstance(row, Dropped):
            return row
        if row.trained_tokens == 0:
            return Dropped(row.place, RowFault.NOTHING_TO_TRAIN, "has an answer with nothing to train")
    assert isinstance(chosen, Example)
    assert isinstance(rejected, Example)
    return dataclasses.replace(
        chosen,
        input_ids=[*chosen.input_ids, *rejected.input_ids],
        labels=[*chosen.labels, NOT_TRAINED, *rejected.labels[1:]],
        rejected_at=len(chosen.input_ids),
    )


def _tokenized(
    items: Sequence[Conversation | Document], template: ChatTemplate | None, encoder: Encoder
) -> list[Example | Dropped]:
    cut = _pieces(items, template)
    encoded = iter(
        encoder.rows([[piece.text for piece in pieces] for pieces in cut if not isinstance(pieces, Dropped)])
    )
    return [
        pieces if isinstance(pieces, Dropped) else _example(item, pieces, next(encoded), encoder)
        for item, pieces in zip(items, cut, strict=True)
    ]


def prompt_of(messages: Sequence[Message], template: ChatTemplate, encoder: Encoder) -> list[int]:
    """The conversation so far as training would feed it, up to where the answer begins. Raises ModelError for one that
    the chat template does not take."""
    asked = Conversation((*messages, Message("assistant", "x")), "this conversation")
    (example,) = tokenize([asked], template, encoder)
    if isinstance(example, Dropped):
        raise ModelError(f"{example.place}: {example.reason}.")
    return example.prompt_ids


def _pieces(items: Sequence[Conversation | Document], template: ChatTemplate | None) -> list[Sequence[Piece] | Dropped]:
    chats = [(item.messages, item.tools) for item in items if isinstance(item, Conversation)]
    assert template is not None or not chats, "conversations need a chat template"
    traced = iter(template.all_pieces(chats) if template is not None else ())
    return [
        [Piece(item.text, True)] if isinstance(item, Document) else _or_dropped(item.place, next(traced))
        for item in items
    ]


def _or_dropped(place: str, pieces: Sequence[Piece] | Untraceable) -> Sequence[Piece] | Dropped:
    return Dropped(place, RowFault.TEMPLATE_REFUSES, str(pieces)) if isinstance(pieces, Untraceable) else pieces


def _example(
    item: Conversation | Document, pieces: Sequence[Piece], encoded: list[list[int]], encoder: Encoder
) -> Example:
    """The pieces' ids joined; no token spans the border between what is trained and what is not."""
    encoded[0] = encoder.with_one_bos(encoded[0])
    if isinstance(item, Document):
        ids = [*encoded[0], *encoder.end_of(item)]
        return Example(ids, list(ids), [], "", item.text, item.place)
    ids = [token for part in encoded for token in part]
    labels = [
        token if piece.trained else NOT_TRAINED for piece, part in zip(pieces, encoded, strict=True) for token in part
    ]
    last = max(i for i, piece in enumerate(pieces) if piece.trained)
    while pieces[last - 1].is_thought:
        last -= 1
    prompt = [token for part in encoded[:last] for token in part]
    question = next((m.content for m in reversed(item.messages[: item.last_trained]) if m.role == "user"), "")
    return Example(ids, labels, prompt, question, answer_of(item.messages[item.last_trained]), item.place, item.check)


def answer_of(message: Message) -> str:
    """What an answer says and calls, as a reference is shown and compared."""
    return "\n".join(filter(None, (message.content, *map(as_text, message.calls))))


def fit(example: Example, max_tokens: int, is_cut: bool) -> Example | Dropped:
    """The row if it is short enough; else cut on the right, or dropped. A row with nothing left to train is dropped."""
    if example.trained_tokens == 0:
        return Dropped(example.place, RowFault.NOTHING_TO_TRAIN, "has nothing to train")
    if len(example.input_ids) <= max_tokens:
        return example
    if example.rejected_at:
        told = f"is longer than data.max_tokens = {max_tokens:,} with both of its answers"
        return Dropped(example.place, RowFault.TOO_LONG, told)
    if not is_cut:
        return Dropped(example.place, RowFault.TOO_LONG, f"is longer than data.max_tokens = {max_tokens:,}")
    ids, labels = example.input_ids[:max_tokens], example.labels[:max_tokens]
    kept = dataclasses.replace(example, input_ids=ids, labels=labels)
    if kept.trained_tokens == 0:
        return Dropped(example.place, RowFault.NOTHING_TO_TRAIN, "has nothing to train once cut")
    return dataclasses.replace(kept, cut_tokens=example.trained_tokens - kept.trained_tokens)
