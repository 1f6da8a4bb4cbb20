"""What is looked at in every row, and what is kept of it once it is gone."""

import re
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from qtune.audit.issues import MOST_PLACES, Groups, Place
from qtune.audit.near_duplicates import Likeness, Marks
from qtune.audit.row_locations import Places
from qtune.audit.secrets import personal_data_in, secrets_in
from qtune.data import encodings
from qtune.data.chat_template import ChatTemplate
from qtune.data.formats import Message
from qtune.data.formats.tool_calls import faults_of
from qtune.data.row_stream import Batch
from qtune.data.rows import Conversation, Cut, Document, Dropped, Example, text_of_message
from qtune.evaluate.metrics import FaultOf
from qtune.recipe.schema import Data

SHOWN_ROLES = 6
NOT_ASKED, ASKED, NOT_SCORABLE = range(3)
HIDDEN = "not shown, as the row seems to hold secrets or personal data"


@dataclass
class Taken:
    """The rows a run takes, a byte each: whether it could ask and score them. `faults` has the first not scorable."""

    fault_of: FaultOf | None = None
    rows: array = field(default_factory=lambda: array("B"))
    faults: dict[int, Place] = field(default_factory=dict)

    def add(self, row: Example) -> None:
        fault = self.fault_of(row) if self.fault_of and row.prompt_ids else None
        if fault is not None and len(self.faults) < MOST_PLACES:
            self.faults[len(self.rows)] = Place(row.place, fault)
        self.rows.append(NOT_SCORABLE if fault is not None else ASKED if row.prompt_ids else NOT_ASKED)


@dataclass
class Seen:
    """What is kept of the rows that went by; `unused` counts them by what of them is read by nobody."""

    likeness: Likeness
    taken: Taken = field(default_factory=Taken)
    cut: Cut = field(default_factory=Cut)
    unused: Counter[str] = field(default_factory=Counter)
    notices: list[str] = field(default_factory=list)
    groups: Groups = field(default_factory=Groups)
    places: Places = field(default_factory=Places)
    tokens: array = field(default_factory=lambda: array("I"))
    trained: array = field(default_factory=lambda: array("I"))
    lost_trained_tokens: int = 0


@dataclass(frozen=True)
class Looked:
    """What was seen in rows that have tokens, in this process or another.

    `told` has a kind and a clause for each thing that is wrong with the text of a row; `marks` are those of all.
    """

    told: list[list[tuple[str, str]]]
    marks: Marks


def look_at(rows: Sequence[Conversation | Document]) -> Looked:
    """All that goes by the text alone, and takes long."""
    return Looked([list(_told_of(row)) for row in rows], Marks.of(list(map(_whole, rows)), list(map(_compared, rows))))


def see_batch(batch: Batch[Looked], template: ChatTemplate | None, data: Data, seen: Seen) -> None:
    """Keep what is wrong with each row of a batch."""
    told = iter(batch.looked.told)
    for row in batch.rows:
        if isinstance(row, Dropped):
            seen.groups.add(row.fault, row.place, row.reason)
            continue
        seen.unused.update(row.parsed.unused)
        seen.places.add(row.whole.place)
        seen.tokens.append(len(row.whole.input_ids))
        seen.trained.append(row.whole.trained_tokens)
        seen.cut.see(row.parsed, len(row.parts))
        _see_length(row.whole, row.parts, data, seen)
        for code, clause in next(told):
            seen.groups.add(code, row.whole.place, clause)
        if isinstance(row.parsed, Conversation):
            see_roles(row.parsed, template, seen.groups)
    seen.likeness.add(batch.looked.marks)


def _see_length(row: Example, parts: Sequence[Example | Dropped], data: Data, seen: Seen) -> None:
    """What a run takes of the row, and what it leaves."""
    taken = [part for part in parts if isinstance(part, Example)]
    for part in taken:
        seen.taken.add(part)
    if row.trained_tokens == 0:
        seen.groups.add("nothing-to-train", row.place, f"has {len(row.input_ids):,} tokens and trains none of them")
    if len(row.input_ids) <= data.max_tokens or len(parts) > 1:
        return
    lost = taken[0].cut_tokens if taken else row.trained_tokens
    seen.lost_trained_tokens += lost
    told = f"has {len(row.input_ids):,} tokens; {lost:,} of {row.trained_tokens:,} trained ones are lost"
    seen.groups.add("too-long", row.place, told)


def _told_of(item: Conversation | Document) -> Iterator[tuple[str, str]]:
    text = item.text if isinstance(item, Document) else "\n".join(map(text_of_message, item.messages + item.rejected))
    keys, personal = list(secrets_in(text)), list(personal_data_in(text))
    for code, told in (("secret", keys), ("personal-data", personal)):
        if told:
            yield code, ", ".join(told)
    for code, excerpt in (("lost-character", encodings.lost_characters(text)), ("mojibake", encodings.mojibake(text))):
        if excerpt:
            yield code, HIDDEN if keys or personal else excerpt
    if isinstance(item, Conversation) and item.tools:
        for message in item.messages + item.rejected:
            yield from faults_of(message.calls, item.tools)


def see_roles(item: Conversation, template: ChatTemplate | None, groups: Groups) -> None:
    roles = [message.role for message in item.messages]
    if roles[0] == "system":
        if template is not None and not template.takes_system:
            groups.add("system-moved", item.place, "has a system prompt")
        roles = roles[1:]
    turns = re.sub(r"(?:assistant (?:tool )+)+assistant ", "assistant ", "".join(f"{role} " for role in roles))
    if turns != "user assistant " * (len(turns.split()) // 2):
        shown = ", ".join(roles[:SHOWN_ROLES]) + (", …" if len(roles) > SHOWN_ROLES else "")
        groups.add("role-order", item.place, shown)


def _whole(item: Conversation | Document) -> str:
    if isinstance(item, Document):
        return item.text
    return "\n".join([*map(_with_role, item.messages + item.rejected), *([item.tools] if item.tools else [])])


def _with_role(message: Message) -> str:
    return f"{message.role}: {text_of_message(message)}"


def _compared(item: Conversation | Document) -> str:
    """Without the system prompt, which many rows may share and be different for all that."""
    if isinstance(item, Document):
        return item.text
    return "\n".join(text_of_message(each) for each in item.messages + item.rejected if each.role != "system")
