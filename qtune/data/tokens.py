"""Conversations and documents become token ids and labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from qtune.data.formats import Conversation, Document
from qtune.data.rows import Dropped
from qtune.data.template import ChatTemplate, Piece, Untraceable

NOT_TRAINED = -100


@dataclass(frozen=True)
class Example:
    """One row, ready for the model: `labels` are the ids where trained and -100 elsewhere, both of one length.

    `prompt_ids` is what the model sees before the last answer (empty for a document), `prompt_text` and `answer` the
    last question and answer as written, `cut_tokens` how many trained tokens truncation took.
    """

    input_ids: list[int]
    labels: list[int]
    prompt_ids: list[int]
    prompt_text: str
    answer: str
    place: str
    cut_tokens: int = 0

    @property
    def trained_tokens(self) -> int:
        """Labels that count; the first token is never predicted."""
        return sum(label != NOT_TRAINED for label in self.labels[1:])


@dataclass(frozen=True)
class Encoder:
    """Text to ids, piece by piece, with exactly one BOS at the start of a row where the tokenizer has one."""

    tokenizer: PreTrainedTokenizerBase
    guard_id: int | None
    bos_id: int | None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "Encoder":
        bos = tokenizer.bos_token_id
        adds_bos = bos is not None and tokenizer("x")["input_ids"][:1] == [bos]
        guard = tokenizer.bos_token_id if bos is not None else tokenizer.eos_token_id
        return cls(tokenizer, guard, bos if adds_bos else None)

    def pieces(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text as it stands in the middle of a row.

        SentencePiece tokenizers put a space before the first word of a text. A special token is written before each
        piece and its id taken off again, so that a piece is no beginning.
        """
        if self.guard_id is None:
            return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        guard = self.tokenizer.convert_ids_to_tokens(self.guard_id)
        rows = self.tokenizer([guard + text for text in texts], add_special_tokens=False)["input_ids"]
        return [row[1:] for row in rows]

    def with_one_bos(self, ids: list[int]) -> list[int]:
        """`ids` with the BOS the tokenizer would add; a template that wrote one, or two, keeps one."""
        bos = self.tokenizer.bos_token_id
        while bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]
        return [self.bos_id, *ids] if self.bos_id is not None and ids[:1] != [self.bos_id] else ids


def tokenize(
    item: Conversation | Document,
    template: ChatTemplate | None,
    encoder: Encoder,
    max_tokens: int,
    on_long: Literal["drop", "truncate", "error"],
) -> Example | Dropped:
    """One row as ids and labels, or why it is not used. `template` is only asked for conversations."""
    if isinstance(item, Document):
        example = _document(item, encoder)
    else:
        assert template is not None, "conversations need a chat template"
        try:
            example = _conversation(item, template.pieces(item.messages), encoder)
        except Untraceable as fault:
            return Dropped(item.place, str(fault))
    return _fit(example, max_tokens, on_long)


def _document(item: Document, encoder: Encoder) -> Example:
    """All of a text, BOS before and EOS after it, every token but the first trained."""
    end = encoder.tokenizer.eos_token_id
    ids = encoder.with_one_bos(encoder.tokenizer(item.text, add_special_tokens=False)["input_ids"])
    ids = ids if end is None else [*ids, end]
    return Example(ids, list(ids), [], "", item.text, item.place)


def _conversation(item: Conversation, pieces: Sequence[Piece], encoder: Encoder) -> Example:
    """Prompts and answers tokenised apart and joined as ids: no token spans the border between them."""
    encoded = encoder.pieces([piece.text for piece in pieces])
    encoded[0] = encoder.with_one_bos(encoded[0])
    ids = [token for part in encoded for token in part]
    labels = [
        token if piece.trained else NOT_TRAINED for piece, part in zip(pieces, encoded, strict=True) for token in part
    ]
    last = max(i for i, piece in enumerate(pieces) if piece.trained)
    prompt = [token for part in encoded[:last] for token in part]
    question = next((m.content for m in reversed(item.messages[:-1]) if m.role == "user"), "")
    return Example(ids, labels, prompt, question, item.messages[-1].content, item.place)


def _fit(example: Example, max_tokens: int, on_long: str) -> Example | Dropped:
    """The row if it is short enough; else cut on the right, or the reason it is dropped."""
    length = len(example.input_ids)
    if length > max_tokens and on_long != "truncate":
        return Dropped(example.place, f"is longer than data.max_tokens = {max_tokens:,}")
    if length > max_tokens:
        ids, labels = example.input_ids[:max_tokens], example.labels[:max_tokens]
        kept = Example(ids, labels, example.prompt_ids, example.prompt_text, example.answer, example.place)
        example = Example(**{**vars(kept), "cut_tokens": example.trained_tokens - kept.trained_tokens})
    if example.trained_tokens == 0:
        return Dropped(
            example.place, "has nothing to train once cut" if length > max_tokens else "has nothing to train"
        )
    return example
