"""One raw row becomes a conversation or a document; one function per format."""

import json
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from qtune.data.rows import Dropped, Row
from qtune.errors import DataError
from qtune.recipe.schema import Columns, DataFormat

ROLE_BY_NAME = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}


@dataclass(frozen=True)
class Message:
    """One turn; `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """Turns that end with an assistant's, where they come from, and what a metric holds the answer against."""

    messages: tuple[Message, ...]
    place: str
    check: str = ""


@dataclass(frozen=True)
class Document:
    """Plain text, all of it to be learned."""

    text: str
    place: str


class BadRow(Exception):
    """A row that cannot be used; the message is a clause such as `the answer is null`."""


@dataclass(frozen=True)
class Format:
    """How rows of one shape are read.

    `fields` names every field the format has, with the columns it is looked for in (none: only where the recipe maps
    one); a row must have the `needed` ones.
    """

    fields: dict[str, tuple[str, ...]]
    needed: tuple[str, ...]
    read: Callable[[dict[str, Any], str | None], tuple[Message, ...] | str]

    def columns(self, present: Collection[str], mapped: Columns) -> dict[str, str]:
        """The column of each field that has one: the mapped one, else the first of its own that no mapping claims."""
        claimed = {field: column for field, column in mapped if column is not None}
        free = [column for column in present if column not in claimed.values()]
        found = {}
        for field, own in self.fields.items():
            candidates = [claimed[field]] if field in claimed else [name for name in own if name in free]
            if candidates and candidates[0] in present:
                found[field] = candidates[0]
        return found

    def fits(self, present: Collection[str], mapped: Columns) -> bool:
        """Whether the needed columns are there, and every mapped field is one that this format has."""
        found = self.columns(present, mapped)
        fields = {field for field, column in mapped if column is not None}
        return all(field in found for field in self.needed) and fields <= self.fields.keys()

    @property
    def wanted(self) -> str:
        """The needed columns in words, alternatives after a slash."""
        return " and ".join("/".join(self.fields[field]) for field in self.needed)


def _pair(values: dict[str, Any], system: str | None) -> tuple[Message, ...]:
    """Prompt, optional input under it, and completion."""
    prompt = _text(values, "prompt", "prompt")
    extra = _input(values)
    if extra:
        prompt = f"{prompt}\n\n{extra}"
    turns = [Message("user", prompt), Message("assistant", _text(values, "completion", "answer"))]
    return (*_system(values, system), *_history(values.get("history") or []), *turns)


def _input(values: dict[str, Any]) -> str:
    """The extra input, stripped; a list of texts is joined as paragraphs."""
    extra = values.get("input")
    parts = extra if isinstance(extra, list) else [] if extra is None else [extra]
    for part in parts:
        if not isinstance(part, str):
            raise BadRow(f"the input is {_kind(part)}, not text")
    return "\n\n".join(parts).strip()


def _history(past: Any) -> list[Message]:
    """Earlier turns as alpaca has them: a list of [question, answer]."""
    pairs = past if isinstance(past, list) else [past]
    if not all(isinstance(pair, list) and [type(part) for part in pair] == [str, str] for pair in pairs):
        raise BadRow("the history is not a list of question and answer texts")
    return [Message(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)]


def _chat(values: dict[str, Any], system: str | None) -> tuple[Message, ...]:
    """A list of messages: role/content, from/value, or human/assistant pairs."""
    turns = values["messages"]
    if not isinstance(turns, list):
        raise BadRow(f"the messages are {_kind(turns)}, not a list")
    if not turns:
        raise BadRow("the list of messages is empty")
    messages = [message for number, turn in enumerate(turns, start=1) for message in _turn(number, turn)]
    if not messages or messages[-1].role != "assistant":
        last = messages[-1].role if messages else "system"
        raise BadRow(f"the last message is the {last}'s, so there is no answer to learn")
    return (*(() if messages[0].role == "system" else _system(values, system)), *messages)


def _turn(number: int, turn: Any) -> list[Message]:
    """The message of one turn, or both of a pair; none for a system prompt that says nothing."""
    if not isinstance(turn, dict):
        raise BadRow(f"message {number} is {_kind(turn)}, not an object with role and content")
    if "human" in turn and "assistant" in turn:
        return [Message(ROLE_BY_NAME[key], _content(number, turn[key])) for key in ("human", "assistant")]
    if turn.get("tool_calls") or turn.get("function_call"):
        raise BadRow(f"message {number} calls a tool, and qtune trains text only")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if role is None:
        raise BadRow(f"message {number} has no role")
    if not isinstance(role, str) or role not in ROLE_BY_NAME:
        raise BadRow(f"message {number} has the role {role!r}, which does not exist: system, user or assistant")
    if role == "system" and (content is None or content == ""):
        return []
    return [Message(ROLE_BY_NAME[role], _content(number, content))]


def _content(number: int, content: Any) -> str:
    """Text, or the texts of a list of parts joined."""
    if isinstance(content, list):
        parts = [part.get("text", part.get("value")) if isinstance(part, dict) else None for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) < len(parts):
            raise BadRow(f"message {number} holds a part that is no text")
        content = "".join(texts)
    if not isinstance(content, str):
        raise BadRow(f"the content of message {number} is {_kind(content)}, not text")
    if not content.strip():
        raise BadRow(f"the content of message {number} is empty")
    return content


def _document(values: dict[str, Any], system: str | None) -> str:
    return _text(values, "text", "text")


def _text(values: dict[str, Any], field: str, called: str) -> str:
    value = values.get(field)
    if not isinstance(value, str):
        raise BadRow(f"the {called} is {_kind(value)}" + ("" if value is None else ", not text"))
    if not value.strip():
        raise BadRow(f"the {called} is empty")
    return value


def _system(values: dict[str, Any], system: str | None) -> tuple[Message, ...]:
    own = values.get("system")
    if own is not None and not isinstance(own, str):
        raise BadRow(f"the system prompt is {_kind(own)}, not text")
    chosen = own if own and own.strip() else system
    return (Message("system", chosen),) if chosen else ()


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number", list: "a list", str: "text"}
    return names.get(type(value), "an object")


FORMATS = {
    "messages": Format({"messages": ("messages",), "system": ("system",), "check": ()}, ("messages",), _chat),
    "sharegpt": Format(
        {"messages": ("conversations", "conversation"), "system": ("system",), "check": ()}, ("messages",), _chat
    ),
    "alpaca": Format(
        {
            "prompt": ("instruction",),
            "completion": ("output",),
            "input": ("input",),
            "system": ("system",),
            "history": ("history",),
            "check": (),
        },
        ("prompt", "completion"),
        _pair,
    ),
    "prompt-completion": Format(
        {
            "prompt": ("prompt",),
            "completion": ("completion", "response"),
            "input": (),
            "system": ("system",),
            "check": (),
        },
        ("prompt", "completion"),
        _pair,
    ),
    "question-answer": Format(
        {
            "prompt": ("question", "query", "input"),
            "completion": ("answer", "response", "output"),
            "input": (),
            "system": ("system",),
            "check": (),
        },
        ("prompt", "completion"),
        _pair,
    ),
    "text": Format({"text": ("text",)}, ("text",), _document),
}


def recognise(wanted: DataFormat, rows: Sequence[Row], mapped: Columns) -> str:
    """The name of the format to read `rows` with; auto goes by the first row, then by the columns of all.

    Raises DataError where the columns fit no format, or not the wanted one, and for a mapped column no row has. That of
    `check` may be in the held-out rows alone, whose answers it is for.
    """
    present = list(dict.fromkeys(column for row in rows for column in row.values))
    for field, column in mapped:
        if column is not None and column not in present and field != "check":
            near = get_close_matches(column, present, 1)
            hint = f" Did you mean {near[0]}?" if near else f" The columns are {', '.join(present)}."
            raise DataError(f'data.columns.{field} = "{column}": no row has such a column.{hint}')
    candidates = list(FORMATS) if wanted == "auto" else [wanted]
    for columns in (list(rows[0].values), present):
        for name in candidates:
            if FORMATS[name].fits(columns, mapped):
                return name
    asked = "no format fits" if wanted == "auto" else f'data.format = "{wanted}" does not fit'
    needs = "; ".join(f"{name} needs {FORMATS[name].wanted}" for name in candidates)
    raise DataError(
        f"{asked} the columns {', '.join(present)}: {needs}. Name yours in [data.columns], such as"
        ' prompt = "ask" and completion = "reply".'
    )


def read(row: Row, name: str, mapped: Columns, system: str | None) -> Conversation | Document | Dropped:
    """The row as the format `name` reads it, or why it cannot be."""
    form = FORMATS[name]
    columns = form.columns(row.values.keys(), mapped)
    missing = [field for field in form.needed if field not in columns]
    if missing:
        return Dropped(row.place, f"has no column for the {' and the '.join(missing)}")
    try:
        result = form.read({field: row.values[column] for field, column in columns.items()}, system)
        _refuse_half_characters([result] if isinstance(result, str) else [message.content for message in result])
    except BadRow as fault:
        return Dropped(row.place, str(fault))
    if isinstance(result, str):
        return Document(result, row.place)
    return Conversation(result, row.place, _check(row.values.get(columns.get("check", ""))))


def _check(value: Any) -> str:
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
            raise BadRow(f"the text holds half a character (\\u{ord(text[fault.start]):04x})") from None
