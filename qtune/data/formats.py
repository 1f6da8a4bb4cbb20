"""One raw row becomes a conversation or a document; one function per format."""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from qtune.data.file_readers import Dropped, Row, seem_a_row
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
TOOL_ROLES = ("tool", "function", "function_call", "observation", "ipython")
SHOWN_COLUMNS, COLUMN_CHARACTERS = 12, 40  # of columns that no format fits; those of a file without a header are rows


@dataclass(frozen=True)
class Message:
    """One turn; `role` is system, user or assistant. An assistant's is learned where `is_trained`."""

    role: str
    content: str
    is_trained: bool = True


@dataclass(frozen=True)
class Conversation:
    """Turns that end with an assistant's, where they come from, and what a metric holds the answer against.

    `unused` names the columns and the fields of messages that hold something and are read by nobody.
    """

    messages: tuple[Message, ...]
    place: str
    check: str = ""
    unused: tuple[str, ...] = ()

    @property
    def last_trained(self) -> int:
        """Which message is the last answer that is learned."""
        return max(i for i, message in enumerate(self.messages) if message.role == "assistant" and message.is_trained)


@dataclass(frozen=True)
class Document:
    """Plain text, all of it to be learned; it goes on in the next one of its file where `continues`."""

    text: str
    place: str
    unused: tuple[str, ...] = ()
    continues: bool = False


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

    def is_known_by(self, present: Collection[str], mapped: Columns) -> bool:
        """Whether a column has a name of this format's own; a system prompt has the same in all of them."""
        claimed = {field for field, column in mapped if column is not None}
        return bool(self.columns(present, mapped).keys() - claimed - {"system"})

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
    if not any(message.is_trained for message in messages if message.role == "assistant"):
        raise BadRow("every answer has the weight 0, so there is no answer to learn")
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
    if role in TOOL_ROLES:
        raise BadRow(f"message {number} is a tool's (its role is {role!r}), and qtune trains text only")
    if not isinstance(role, str) or role not in ROLE_BY_NAME:
        raise BadRow(f"message {number} has the role {role!r}, which does not exist: system, user or assistant")
    if role == "system" and (content is None or content == ""):
        return []
    return [Message(ROLE_BY_NAME[role], _content(number, content), _is_trained(number, turn))]


def _is_trained(number: int, turn: dict[str, Any]) -> bool:
    """OpenAI's `weight` of an answer: 0 is read only, 1 is trained, as one without it is. No other turn is trained."""
    weight = turn.get("weight")
    if not _is_answer(turn) or weight is None:
        return True
    if isinstance(weight, bool) or weight not in (0, 1):
        found = weight if isinstance(weight, int | float) and not isinstance(weight, bool) else _kind(weight)
        raise BadRow(f"the weight of message {number} is {found}; 0 reads an answer only, and 1 trains it")
    return bool(weight)


def _is_answer(turn: dict[str, Any]) -> bool:
    return ROLE_BY_NAME.get(str(turn.get("role", turn.get("from")))) == "assistant"


def _unused_in_turns(turns: Iterable[Any]) -> Iterator[str]:
    """The fields of messages, and of the parts they are made of, that hold something and are not read."""
    for turn in turns:
        if "human" in turn and "assistant" in turn:
            yield from _held(turn, ("human", "assistant"))
            continue
        role, content = ("role" if "role" in turn else "from"), ("content" if "content" in turn else "value")
        yield from _held(turn, (role, content, "weight"))
        if turn.get("weight") and not _is_answer(turn):
            yield "weight of a question"
        for part in turn[content] if isinstance(turn.get(content), list) else ():
            yield from _held(part, ("type", "text" if "text" in part else "value"))


def _held(values: dict[str, Any], used: Collection[str]) -> Iterator[str]:
    """The names outside `used` that hold something."""
    return (name for name, value in values.items() if name not in used and value not in (None, "", [], {}))


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
            "completion": ("output", "response"),
            "input": ("input", "context"),
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
            "prompt": ("question", "query", "ask", "input"),
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

    Where several fit it is the first that knows a column by its own name; prompt-completion where all are mapped.
    Raises DataError where the columns fit no format, or not the wanted one, and for a mapped column no row has. That of
    `check` may be in the held-out rows alone, whose answers it is for.
    """
    present = list(dict.fromkeys(column for row in rows for column in row.values))
    for field, column in mapped:
        if column is not None and column not in present and field != "check":
            near = get_close_matches(column, present, 1)
            hint = f" Did you mean {near[0]}?" if near else f" The columns are {_listed(present)}."
            raise DataError(f'data.columns.{field} = "{column}": no row has such a column.{hint}')
    candidates = list(FORMATS) if wanted == "auto" else [wanted]
    for columns in (list(rows[0].values), present):
        fitting = [name for name in candidates if FORMATS[name].fits(columns, mapped)]
        known = [name for name in fitting if FORMATS[name].is_known_by(columns, mapped)]
        if fitting:
            return next(iter(known), "prompt-completion" if "prompt-completion" in fitting else fitting[0])
    raise DataError(_no_format(wanted, candidates, rows[0], present))


def _no_format(wanted: str, candidates: Sequence[str], first: Row, present: Sequence[str]) -> str:
    """What is wrong with columns that fit no format, and what would work."""
    asked = "no format fits" if wanted == "auto" else f'data.format = "{wanted}" does not fit'
    says = f"{asked} the columns {_listed(present)}"
    if {"chosen", "rejected"} <= set(present):
        return (
            f"{says}: these are preferences (DPO), and qtune does not train on pairs of answers yet. To learn the"
            f" chosen ones alone: [data] columns = {{ {_chosen_alone(first, present)} }}."
        )
    if seem_a_row(present):
        return f"{says}, which seem to be a row: has the file no header? Write one above it: question,answer."
    needs = "; ".join(f"{name} needs {FORMATS[name].wanted}" for name in candidates)
    prompt, completion = present if len(present) == 2 else ("request", "reply")
    return (
        f'{says}: {needs}. Name yours in [data.columns], such as prompt = "{prompt}" and completion = "{completion}".'
    )


def _chosen_alone(first: Row, present: Sequence[str]) -> str:
    """The mapping that reads the chosen answers of preferences."""
    if isinstance(first.values.get("chosen"), list):
        return 'messages = "chosen"'
    is_known = any(form.fits(present, Columns(completion="chosen")) for form in FORMATS.values())
    others = [name for name in present if name not in ("chosen", "rejected")]
    return 'completion = "chosen"' + ("" if is_known or not others else f', prompt = "{others[0]}"')


def _listed(columns: Sequence[str]) -> str:
    """Names of columns, long ones cut and many left out."""
    cut = [name if len(name) <= COLUMN_CHARACTERS else f"{name[:COLUMN_CHARACTERS]}…" for name in columns]
    more = [f"and {len(cut) - SHOWN_COLUMNS} more"] if len(cut) > SHOWN_COLUMNS else []
    return ", ".join([*cut[:SHOWN_COLUMNS], *more]).replace("\n", " ")


def read(row: Row, name: str, mapped: Columns, system: str | None) -> Conversation | Document | Dropped:
    """The row as the format `name` reads it, or why it cannot be."""
    form = FORMATS[name]
    columns = form.columns(row.values.keys(), mapped)
    missing = [field for field in form.needed if field not in columns]
    if missing:
        return Dropped(row.place, f"has no column for the {' and the '.join(missing)}")
    values = {field: row.values[column] for field, column in columns.items()}
    try:
        result = form.read(values, system)
        _refuse_half_characters([result] if isinstance(result, str) else [message.content for message in result])
    except BadRow as fault:
        return Dropped(row.place, str(fault))
    unused = _unused(row, columns, values, result)
    if isinstance(result, str):
        return Document(result, row.place, unused, row.continues)
    return Conversation(result, row.place, _check(row.values.get(columns.get("check", ""))), unused)


def _unused(
    row: Row, columns: dict[str, str], values: dict[str, Any], result: tuple[Message, ...] | str
) -> tuple[str, ...]:
    """What of the row is read by nobody: columns without a field, fields of messages, a system prompt beside one."""
    found = dict.fromkeys(_held(row.values, columns.values()))
    found |= dict.fromkeys(_unused_in_turns(values.get("messages", ())))
    own = values.get("system")
    if own and own.strip() and not isinstance(result, str) and result[0].content != own:
        found[columns["system"]] = None
    return tuple(found)


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
