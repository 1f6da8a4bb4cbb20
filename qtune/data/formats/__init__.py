"""How one raw row becomes messages or a text: a file a format. Who adds a file with a `DataFormat` in it has added one.

What is imported here and at the top of these files must be light: the recipe's schema reads the names.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from qtune.registry import registered

Values = dict[str, Any]
"""What a row holds, by field of its format."""


class RowFault(StrEnum):
    """Why a run cannot take a row, by short name. Up to `TEMPLATE_REFUSES` the row is bad, whatever data.max_tokens."""

    UNREADABLE = "unreadable-row"
    MISSING_ANSWER = "missing-answer"
    MISSING_PROMPT = "missing-prompt"
    UNKNOWN_ROLE = "unknown-role"
    TOOL_CALL = "tool-call"
    UNKNOWN_WEIGHT = "unknown-weight"
    HALF_CHARACTER = "half-character"
    EMPTY_TEXT = "empty-text"
    NO_PREFERENCE = "no-preference"
    WRONG_SHAPE = "wrong-shape"
    TEMPLATE_REFUSES = "template-refuses"
    NOTHING_TO_TRAIN = "nothing-to-train"
    TOO_LONG = "too-long"


class BadRow(Exception):
    """A row that cannot be used; the message is a clause such as `the answer is null`."""

    def __init__(self, fault: RowFault, reason: str):
        self.fault = fault
        super().__init__(reason)


@dataclass(frozen=True)
class Call:
    """A call of a tool: `arguments` are the JSON text of an object, `id` is what its result names; "" for none."""

    name: str
    arguments: str
    id: str = ""


@dataclass(frozen=True)
class Message:
    """One turn; `role` is system, user, assistant or tool. An assistant's is learned where `is_trained`.

    An assistant may think before it answers and call tools after that; the content is empty where it does nothing but
    call. `call_id` and `name` say which call a tool's message is the result of. `thoughts` is what the recipe's
    data.thoughts makes of the `thought`, and of an empty one that a template writes.
    """

    role: str
    content: str
    is_trained: bool = True
    calls: tuple[Call, ...] = ()
    call_id: str = ""
    name: str = ""
    thought: str = ""
    thoughts: str = "train"


@dataclass(frozen=True)
class Pair:
    """Two conversations that are the same up to an answer, of which the `chosen` one is to be preferred.

    Only what is answered from there on is learned from.
    """

    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]


def _nothing(values: Values) -> Iterator[str]:
    return iter(())


def _no_tools(values: Values) -> str:
    return ""


def _any(values: Values) -> bool:
    return True


@dataclass(frozen=True)
class DataFormat:
    """How rows of one shape are read.

    `fields` names every field the format has, with the columns it is looked for in (none: only where the recipe maps
    one); a row must have the `needed` ones. `read` makes of a row's values, and of the recipe's system prompt, messages
    that end with an assistant's, one text, or where it `is_pairs` a Pair, and raises BadRow. `tools` gives those the
    assistant is shown, as `tool_calls.tools_text` does. `unread` names what within the values is read by nobody.
    `is_meant` tells a row from one of another format with the same columns. `order` is that in which formats are tried.
    """

    name: str
    description: str
    fields: Mapping[str, tuple[str, ...]]
    needed: tuple[str, ...]
    read: Callable[[Values, str | None], tuple[Message, ...] | str | Pair]
    tools: Callable[[Values], str] = _no_tools
    unread: Callable[[Values], Iterator[str]] = _nothing
    is_meant: Callable[[Values], bool] = _any
    is_text: bool = False
    is_pairs: bool = False
    order: int = 100

    def columns(self, present: Collection[str], mapped: Mapping[str, str]) -> dict[str, str]:
        """The column of each field that has one: the mapped one, else the first of its own that no mapping claims, in
        whatever capitals where none is spelled as here (a CSV file's `Prompt`)."""
        by_field = {}
        claimed = tuple(mapped.values())
        free = {name.strip().casefold(): name for name in present if name not in claimed}
        for field, own in self.fields.items():
            names = [mapped[field]] if field in mapped else [name for name in own if name not in claimed]
            column = next((name for name in names if name in present), None)
            if column is None and field not in mapped:
                column = next((free[name] for name in names if name in free), None)
            if column is not None:
                by_field[field] = column
        return by_field

    def fits(self, present: Collection[str], mapped: Mapping[str, str]) -> bool:
        """Whether the needed columns are there, and every mapped field is one that this format has."""
        return set(self.needed) <= self.columns(present, mapped).keys() and mapped.keys() <= self.fields.keys()

    def is_known_by(self, present: Collection[str], mapped: Mapping[str, str]) -> bool:
        """Whether a column has a name of this format's own; a system prompt has the same in all of them."""
        return bool(self.columns(present, mapped).keys() - mapped.keys() - {"system"})

    @property
    def wanted(self) -> str:
        """The needed columns in words, alternatives after a slash."""
        return " and ".join("/".join(self.fields[field]) for field in self.needed)


def text_of(value: Any, called: str, fault: RowFault | None = None) -> str:
    """`value`, which must be text that says something; `fault` is what a row has where it is none."""
    if not isinstance(value, str):
        otherwise = RowFault.EMPTY_TEXT if value is None else RowFault.WRONG_SHAPE
        raise BadRow(fault or otherwise, f"the {called} is {kind_of(value)}" + ("" if value is None else ", not text"))
    if not value.strip():
        raise BadRow(fault or RowFault.EMPTY_TEXT, f"the {called} is empty")
    return value


def system_of(values: Values, system: str | None) -> tuple[Message, ...]:
    """The row's own system prompt, else the recipe's; none where neither has one."""
    own = values.get("system")
    if own is not None and not isinstance(own, str):
        raise BadRow(RowFault.WRONG_SHAPE, f"the system prompt is {kind_of(own)}, not text")
    chosen = own if own and own.strip() else system
    return (Message("system", chosen),) if chosen else ()


def kind_of(value: Any) -> str:
    """What a value of JSON is, in words."""
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number", list: "a list", str: "text"}
    return names.get(type(value), "an object")


def held(values: Values, used: Collection[str]) -> Iterator[str]:
    """The names outside `used` that hold something."""
    return (name for name, value in values.items() if name not in used and value not in (None, "", [], {}))


FORMATS = registered(__name__, DataFormat)
