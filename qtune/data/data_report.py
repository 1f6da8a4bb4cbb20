"""What the user sees of the data before anything is trained."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy

from qtune.data.chat_template import ChatTemplate
from qtune.data.dataset import Examples
from qtune.data.rows import Conversation, Document, Dropped
from qtune.data.unused_columns import Unused

SHOWN_PLACES = 3


@dataclass(frozen=True)
class Reason:
    """Why rows were dropped, how many, and the first of them."""

    reason: str
    rows: int
    places: tuple[str, ...]


@dataclass(frozen=True)
class DataReport:
    """The data in figures. `sample` is one real row as (text, is trained) pieces; fractions are 0-1.

    `canary_rows` are trained on beside `train_rows`; tokens and packs are of both. `cut_texts` became `pieces`, which
    are rows here.
    """

    source: str
    format: str
    rows_read: int
    dropped: tuple[Reason, ...]
    unused: tuple[Unused, ...]
    cut_texts: int
    pieces: int
    truncated_rows: int
    trained_tokens_lost: int
    train_rows: int
    held_out_rows: int
    canaries: int
    canary_rows: int
    tokens: int
    trained_tokens: int
    longest_row_tokens: int
    packs: int
    pack_fill_fraction: float
    duplicate_rows: int
    overlap_rows: int
    notices: tuple[str, ...]
    sample: tuple[tuple[str, bool], ...]


def group_dropped(dropped: Sequence[Dropped]) -> tuple[Reason, ...]:
    """Dropped rows by reason, the commonest first."""
    places: dict[str, list[str]] = {}
    for row in dropped:
        places.setdefault(row.reason, []).append(row.place)
    ordered = sorted(places.items(), key=lambda item: -len(item[1]))
    return tuple(Reason(reason, len(rows), tuple(rows[:SHOWN_PLACES])) for reason, rows in ordered)


def count_duplicates(examples: Examples) -> int:
    """Rows whose ids stood before already."""
    return len(examples) - len(numpy.unique(examples.digests))


def count_overlap(train: Examples, held_out: Examples) -> int:
    """Held-out rows that are trained on too."""
    return int(numpy.isin(held_out.digests, train.digests).sum())


def template_notices(template: ChatTemplate, items: Sequence[Conversation | Document]) -> tuple[str, ...]:
    """What the chat template does to these rows that their writer may not expect."""
    notices = []
    chats = [item for item in items if isinstance(item, Conversation)]
    if not template.takes_system and any(chat.messages[0].role == "system" for chat in chats):
        notices.append("The chat template knows no system prompt, so it stands before the first question.")
    if template.differing_prompts is not None:
        asked, written = template.differing_prompts
        notices.append(
            f"The chat template asks with {asked!r}, and puts {written!r} before the answer of a row. Answers are"
            " learned and scored behind the second."
        )
    return tuple(notices)
