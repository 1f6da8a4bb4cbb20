"""One raw row becomes a conversation or a document; one function per format."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from qtune.data.rows import Dropped, Row
from qtune.errors import DataError
from qtune.recipe.schema import Columns

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
    """Turns that end with an assistant's, and where they come from."""

    messages: tuple[Message, ...]
    place: str


@dataclass(frozen=True)
class Document:
    """Plain text, all of it to be learned."""

    text: str
    place: str


class BadRow(Exception):
    """A row that cannot be used; the message is a clause such as `the answer is null`."""


@dataclass(frozen=True)
class Format:
    """How rows of one shape are read: the column names each field may have, the needed fields, and the reader."""

    fields: dict[str, tuple[str, ...]]
    needed: tuple[str, ...]
    read: Callable[[dict[str, Any], str | None], tuple[Message, ...] | str]

    @property
    def wanted(self) -> str:
        """The needed columns in words, alternatives after a slash."""
        return " and ".join("/".join(self.fields[field]) for field in self.needed)


def _pair(values: dict[str, Any], system: str | None) -> tuple[Message, ...]:
    """Prompt, optional input under it, and completion."""
    prompt = _text(values, "prompt", "prompt")
    extra = values.get("input")
    if isinstance(extra, str) and extra.strip():
        prompt = f"{prompt}\n\n{extra.strip()}"
    turns = [Message("user", prompt), Message("assistant", _text(values, "completion", "answer"))]
    past = values.get("history") or []
    if not isinstance(past, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in past):
        raise BadRow("the history is not a list of question and answer pairs")
    earlier = [
        Message(role, str(part)) for turn in past for role, part in zip(("user", "assistant"), turn, strict=True)
    ]
    return (*_system(values, system), *earlier, *turns)


def _chat(values: dict[str, Any], system: str | None) -> tuple[Message, ...]:
    """A list of messages: role/content, from/value, or human/assistant pairs."""
    turns = values["messages"]
    if not isinstance(turns, list):
        raise BadRow(f"the messages are {_kind(turns)}, not a list")
    if not turns:
        raise BadRow("the list of messages is empty")
    messages = [message for number, turn in enumerate(turns, start=1) for message in _turn(number, turn)]
    if messages[-1].role != "assistant":
        raise BadRow(f"the last message is the {messages[-1].role}'s, so there is no answer to learn")
    return (*(() if messages[0].role == "system" else _system(values, system)), *messages)


def _turn(number: int, turn: Any) -> list[Message]:
    if not isinstance(turn, dict):
        raise BadRow(f"message {number} is {_kind(turn)}, not an object with role and content")
    if "human" in turn and "assistant" in turn:
        return [
            Message("user", _content(number, turn["human"])),
            Message("assistant", _content(number, turn["assistant"])),
        ]
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(role, str) or role not in ROLE_BY_NAME:
        raise BadRow(f"message {number} has the role {role!r}, which does not exist: system, user or assistant")
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
    chosen = own if isinstance(own, str) and own.strip() else system
    return (Message("system", chosen),) if chosen else ()


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number", list: "a list", str: "text"}
    return names.get(type(value), "an object")


FORMATS = {
    "messages": Format({"messages": ("messages",), "system": ("system",)}, ("messages",), _chat),
    "sharegpt": Format({"messages": ("conversations", "conversation"), "system": ("system",)}, ("messages",), _chat),
    "alpaca": Format(
        {
            "prompt": ("instruction",),
            "completion": ("output",),
            "input": ("input",),
            "system": ("system",),
            "history": ("history",),
        },
        ("prompt", "completion"),
        _pair,
    ),
    "prompt-completion": Format(
        {"prompt": ("prompt",), "completion": ("completion", "response"), "system": ("system",)},
        ("prompt", "completion"),
        _pair,
    ),
    "question-answer": Format(
        {
            "prompt": ("question", "query", "input"),
            "completion": ("answer", "response", "output"),
            "system": ("system",),
        },
        ("prompt", "completion"),
        _pair,
    ),
    "text": Format({"text": ("text",)}, ("text",), _document),
}


def recognise(columns: Collection[str], mapped: Columns) -> str:
    """The format whose needed columns are all there, after the recipe's mapping; DataError where none fits."""
    for name, form in FORMATS.items():
        if all(_column(form, field, columns, mapped) for field in form.needed):
            return name
    wanted = "; ".join(f"{name}: {form.wanted}" for name, form in FORMATS.items())
    raise DataError(
        f"no format has the columns {', '.join(map(repr, columns))}. Formats and their columns: {wanted}."
        ' Name yours in [data.columns], such as prompt = "ask" and completion = "reply".'
    )


def _column(form: Format, field: str, columns: Collection[str], mapped: Columns) -> str | None:
    """The data's column for a field: the mapped one, else the first of the format's own that is there."""
    own = getattr(mapped, field, None)
    candidates = (own,) if own else form.fields.get(field, ())
    return next((name for name in candidates if name in columns), None)


def read(row: Row, name: str, mapped: Columns, system: str | None) -> Conversation | Document | Dropped:
    """The row as the format `name` reads it, or why it cannot be."""
    form = FORMATS[name]
    fields = {field: _column(form, field, row.values, mapped) for field in (*form.fields, "input", "system")}
    missing = [field for field in form.needed if fields[field] is None]
    if missing:
        return Dropped(row.place, f"has no column for the {' and the '.join(missing)}")
    values = {field: row.values[column] for field, column in fields.items() if column is not None}
    try:
        result = form.read(values, system)
    except BadRow as fault:
        return Dropped(row.place, str(fault))
    return Document(result, row.place) if isinstance(result, str) else Conversation(result, row.place)
