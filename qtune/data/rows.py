"""What a row is on its way: raw as its file has it, then a conversation or a document, then tokens; or left out."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from qtune.data.formats import FORMATS, BadRow, DataFormat, Message, Pair, RowFault, Values, held
from qtune.data.formats.thoughts import parted
from qtune.errors import DataError
from qtune.recipe.schema import Data

NOT_TRAINED = -100  # the label that torch's and every other cross-entropy leaves out
SHOWN_COLUMNS, COLUMN_CHARACTERS = 12, 40  # of columns that no format fits; those of a file without a header are rows
NAME_CHARACTERS = 40  # of a column; a text is longer


@dataclass(frozen=True)
class RawRow:
    """Column values, and where they stand (`rows.jsonl:17`, `rows.parquet row 17`).

    `continues` where its text goes on in the next row.
    """

    values: Values
    place: str
    continues: bool = False


@dataclass(frozen=True)
class Dropped:
    """A row that is not used, and why: by kind, and as a clause such as `the answer is null`."""

    place: str
    fault: RowFault
    reason: str


def last_trained(messages: Sequence[Message]) -> int:
    """Which of them is the last answer that is learned."""
    return max(i for i, message in enumerate(messages) if message.role == "assistant" and message.is_trained)


@dataclass(frozen=True)
class Conversation:
    """Turns that end with an assistant's, where they come from, and what a metric holds the answer against.

    `unused` names the columns and the fields of messages that hold something and are read by nobody. `tools` is the
    JSON text of those that the assistant is shown, "" for none. `rejected` are the messages that these are preferred
    to, none but in a pair.
    """

    messages: tuple[Message, ...]
    place: str
    check: str = ""
    unused: tuple[str, ...] = ()
    tools: str = ""
    rejected: tuple[Message, ...] = ()

    @property
    def last_trained(self) -> int:
        """Which message is the last answer that is learned."""
        return last_trained(self.messages)


@dataclass(frozen=True)
class Document:
    """Plain text, all of it to be learned; it goes on in the next one of its file where `continues`."""

    text: str
    place: str
    unused: tuple[str, ...] = ()
    continues: bool = False


@dataclass(frozen=True)
class Example:
    """One row, ready for the model: `labels` are the ids where trained and -100 elsewhere, both of one length.

    `prompt_ids` is what the model sees before the last answer that is trained (empty for a document), `prompt_text` and
    `answer` its question and itself as written, `check` what a metric holds the answer against, `cut_tokens` how many
    trained tokens truncation took. Of a pair the rejected conversation follows the chosen one, from token `rejected_at`
    on; of all else that is 0.
    """

    input_ids: list[int]
    labels: list[int]
    prompt_ids: list[int]
    prompt_text: str
    answer: str
    place: str
    check: str = ""
    cut_tokens: int = 0
    rejected_at: int = 0

    @property
    def trained_tokens(self) -> int:
        """Labels that count; the first token is never predicted."""
        return len(self.labels[1:]) - self.labels[1:].count(NOT_TRAINED)


@dataclass(frozen=True)
class EncodedRow:
    """A usable row: `whole` has all its tokens, `parts` are what a run takes of it, or why it takes none."""

    parsed: Conversation | Document
    whole: Example
    parts: Sequence[Example | Dropped]


@dataclass
class Cut:
    """How many texts were cut so far, and into how many pieces."""

    texts: int = 0
    pieces: int = 0
    is_within_text: bool = False

    def see(self, item: Conversation | Document, parts: int) -> None:
        """Count an item of which a run takes so many parts. A text may come in several documents."""
        if isinstance(item, Document) and (parts > 1 or item.continues or self.is_within_text):
            self.texts += not item.continues
            self.pieces += parts
            self.is_within_text = item.continues


def parse_row(
    row: RawRow, form: DataFormat, mapped: Mapping[str, str], system: str | None
) -> Conversation | Document | Dropped:
    """The row as `form` reads it, or why it cannot be; `mapped` are the columns of fields that the recipe names."""
    try:
        return _parsed(row, form, mapped, system)
    except BadRow as bad:
        return Dropped(row.place, bad.fault, str(bad))


def as_learned(item: Conversation | Document | Dropped, data: Data) -> Conversation | Document | Dropped:
    """The conversation with its thoughts and its answers trained as data.thoughts and data.train_on have it."""
    if not isinstance(item, Conversation):
        return item
    messages, rejected = (_learned(each, data) for each in (item.messages, item.rejected))
    if any(each.role == "assistant" and not each.content and not each.calls for each in (*messages, *rejected)):
        return Dropped(item.place, RowFault.EMPTY_TEXT, "an answer is nothing but a thought")
    if messages == rejected:
        return Dropped(item.place, RowFault.NO_PREFERENCE, "chosen and rejected are the same without their thoughts")
    return dataclasses.replace(item, messages=messages, rejected=rejected)


def _learned(messages: Sequence[Message], data: Data) -> tuple[Message, ...]:
    thinking = [_thinking(each, data.thoughts) if each.role == "assistant" else each for each in messages]
    if data.train_on == "all" or not messages:
        return tuple(thinking)
    last = last_trained(messages)
    return tuple(
        dataclasses.replace(each, is_trained=each.is_trained and at == last) for at, each in enumerate(thinking)
    )


def _thinking(message: Message, mode: str) -> Message:
    """An answer whose thought is trained, only read, or left out. One within the content stays where it is trained."""
    if mode in ("train", "train_all"):
        return message if mode == message.thoughts else dataclasses.replace(message, thoughts=mode)
    within, answer = parted(message.content)
    thought = "" if mode == "drop" else message.thought or within
    return dataclasses.replace(message, content=answer, thought=thought, thoughts=mode)


def _parsed(row: RawRow, form: DataFormat, mapped: Mapping[str, str], system: str | None) -> Conversation | Document:
    columns = form.columns(row.values.keys(), mapped)
    _refuse_missing([field for field in form.needed if field not in columns])
    values = {field: row.values[column] for field, column in columns.items()}
    item, tools = form.read(values, system), form.tools(values)
    result = item.chosen if isinstance(item, Pair) else item
    rejected = item.rejected if isinstance(item, Pair) else ()
    check = _as_text(values.get("check"))
    said = [result] if isinstance(result, str) else [tools, check, *map(text_of_message, (*result, *rejected))]
    _refuse_half_characters(said)
    unused = dict.fromkeys([*held(row.values, columns.values()), *form.unread(values)])
    if isinstance(result, str):
        return Document(result, row.place, tuple(unused), row.continues)
    own = values.get("system")
    is_another = result[0].role == "system" and result[0].content not in (own or "")
    if own and is_another and (not tools or "tools" in values):  # the messages have one of their own
        unused[columns["system"]] = None
    return Conversation(result, row.place, check, tuple(unused), tools, rejected)


def text_of_message(message: Message) -> str:
    """All that a message thinks, says and calls."""
    called = [f"{call.name} {call.arguments}" for call in message.calls]
    return "\n".join(part for part in (message.thought, message.content, *called) if part)


def _refuse_missing(fields: Sequence[str]) -> None:
    if fields:
        faults = {"completion": RowFault.MISSING_ANSWER, "prompt": RowFault.MISSING_PROMPT}
        fault = next((fault for field, fault in faults.items() if field in fields), RowFault.WRONG_SHAPE)
        raise BadRow(fault, f"has no column for the {' and the '.join(fields)}")


def _as_text(value: Any) -> str:
    """Text as it is, a list of texts one a line, everything else as JSON."""
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return "\n".join(value)
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)


def _refuse_half_characters(texts: Iterable[str]) -> None:
    """JSON can spell one half of a surrogate pair, which is no character and has no tokens."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as fault:
            half = f"\\u{ord(text[fault.start]):04x}"
            raise BadRow(RowFault.HALF_CHARACTER, f"the text holds half a character ({half})") from None


def recognise(wanted: str, rows: Sequence[RawRow], mapped: Mapping[str, str], in_pairs: bool = False) -> DataFormat:
    """The format to read `rows` with; auto goes by the first row, then by the columns of all. It is one of pairs where
    what is learned is `in_pairs`, and none elsewhere.

    Where several fit it is the first that knows a column by its own name; prompt-completion where all are mapped.
    Raises DataError where the columns fit no format, or not the wanted one, and for a mapped column no row has. That of
    `check` may be in the held-out rows alone, whose answers it is for.
    """
    present = list(dict.fromkeys(column for row in rows for column in row.values))
    for field, column in mapped.items():
        if column not in present and field != "check":
            near = get_close_matches(column, present, 1)
            hint = f" Did you mean {near[0]}?" if near else f" The columns are {_listed(present)}."
            raise DataError(f'data.columns.{field} = "{column}": no row has such a column.{hint}')
    candidates = [form for form in FORMATS.values() if form.is_pairs == in_pairs and wanted in ("auto", form.name)]
    for columns in (list(rows[0].values), present):
        fitting = [form for form in candidates if form.fits(columns, mapped) and _is_meant(form, rows[0], mapped)]
        known = [form for form in fitting if form.is_known_by(columns, mapped)]
        general = [form for form in fitting if form.name == "prompt-completion"]
        if fitting:
            return (known or general or fitting)[0]
    raise DataError((_no_pairs if in_pairs else _no_format)(wanted, candidates, rows[0], present))


def _is_meant(form: DataFormat, row: RawRow, mapped: Mapping[str, str]) -> bool:
    columns = form.columns(row.values.keys(), mapped)
    return form.is_meant({field: row.values[column] for field, column in columns.items()})


def _no_pairs(wanted: str, candidates: Sequence[DataFormat], first: RawRow, present: Sequence[str]) -> str:
    return (
        f"the columns {_listed(present)} hold no pairs, which train.objective asks for: a chosen and a rejected answer."
        ' Name yours in [data.columns], such as chosen = "better" and rejected = "worse"; rows with one answer are'
        ' learned by train.objective = "sft".'
    )


def _no_format(wanted: str, candidates: Sequence[DataFormat], first: RawRow, present: Sequence[str]) -> str:
    """What is wrong with columns that fit no format, and what would work."""
    asked = "no format fits" if wanted == "auto" else f'data.format = "{wanted}" does not fit'
    says = f"{asked} the columns {_listed(present)}"
    if {"chosen", "rejected"} <= set(present):
        return (
            f'{says}: these are pairs of answers, which train.objective = "dpo" or "orpo" learns from.'
            f" To learn the chosen ones alone: [data] columns = {{ {_chosen_alone(first, present)} }}."
        )
    if seem_a_row(present):
        return f"{says}, which seem to be a row: has the file no header? Write one above it: question,answer."
    needs = "; ".join(f"{form.name} needs {form.wanted}" for form in candidates)
    prompt, completion = present if len(present) == 2 else ("request", "reply")
    return (
        f'{says}: {needs}. Name yours in [data.columns], such as prompt = "{prompt}" and completion = "{completion}".'
    )


def _chosen_alone(first: RawRow, present: Sequence[str]) -> str:
    """The mapping that reads the chosen answers of preferences."""
    if isinstance(first.values.get("chosen"), list):
        return 'messages = "chosen"'
    is_known = any(form.fits(present, {"completion": "chosen"}) for form in FORMATS.values())
    others = [name for name in present if name not in ("chosen", "rejected")]
    return 'completion = "chosen"' + ("" if is_known or not others else f', prompt = "{others[0]}"')


def _listed(columns: Sequence[str]) -> str:
    """Names of columns, long ones cut and many left out."""
    cut = [name if len(name) <= COLUMN_CHARACTERS else f"{name[:COLUMN_CHARACTERS]}…" for name in columns]
    more = [f"and {len(cut) - SHOWN_COLUMNS} more"] if len(cut) > SHOWN_COLUMNS else []
    return ", ".join([*cut[:SHOWN_COLUMNS], *more]).replace("\n", " ")


def seem_a_row(names: Sequence[str]) -> bool:
    """Whether these are texts of a row and no names of columns: long, a sentence, or a number."""
    return any(len(name) > NAME_CHARACTERS or name.endswith((".", "?", "!")) or name.isdecimal() for name in names)
