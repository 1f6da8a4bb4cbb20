"""A text longer than a sequence, cut into pieces of which none is lost.

A piece ends with a paragraph if one ends in it, else with a line that ends a sentence, with a sentence, with a word, or
else at the limit. The text is tokenised whole and its ids are parted, so the pieces joined are the text to the token.

Every piece begins with the BOS that the tokeniser adds, as the model has never seen a sequence without. Only the last
one ends with the end of sequence: the model should not learn that a text ends where a limit fell.
"""

import dataclasses
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence

from qtune.data.rows import Conversation, Document, Dropped, Example
from qtune.data.tokenize import Encoder, fit
from qtune.recipe.schema import Data

SENTENCE = r"[.!?…]+[\"'”’»)\]]*"
ENDS = tuple(  # where a piece may end, best first: a paragraph, a line and sentence, a sentence, a word
    map(re.compile, (r"\n\s*\n", rf"{SENTENCE}[^\S\n]*\n", rf"{SENTENCE}(?=\s)|[。！？]", r"(?=\s)"))
)


def fitted(item: Conversation | Document, row: Example, data: Data, encoder: Encoder) -> Sequence[Example | Dropped]:
    """What a run takes of a row: a text in pieces, and of all else what `fit` leaves."""
    if isinstance(item, Document) and len(row.input_ids) > data.max_tokens:
        return list(_pieces(item, row, data.max_tokens, encoder))
    return [fit(row, data.max_tokens, is_cut=data.on_long == "truncate")]


def _pieces(item: Document, row: Example, max_tokens: int, encoder: Encoder) -> Iterator[Example]:
    ids, spans = encoder.with_spans(item.text)
    end = encoder.end_of(item)
    room = max_tokens - len(end) - (encoder.bos_id is not None)
    at = 0
    while at < len(ids):
        until = len(ids) if len(ids) - at <= room else _cut(item.text, spans, at, at + room)
        part = encoder.with_one_bos(ids[at:until]) + (end if until == len(ids) else [])
        yield dataclasses.replace(row, input_ids=part, labels=list(part), answer="")
        at = until


def _cut(text: str, spans: Sequence[tuple[int, int]], after: int, limit: int) -> int:
    """The token that the next piece begins with, `limit` at the most; it does not begin within a character."""
    if not spans:
        return limit
    first, last = spans[after][0], spans[limit][0]
    for pattern in ENDS:
        end = max((match.end() for match in pattern.finditer(text, first, last + 1)), default=first)
        at = bisect_left(spans, end, key=lambda span: span[0])
        if after < at <= limit:
            return at
    at = limit
    while at > after + 1 and spans[at][0] < spans[at - 1][1]:
        at -= 1
    return at if at > after + 1 else limit
