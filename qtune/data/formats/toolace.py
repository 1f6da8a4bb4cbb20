"""Turns whose system prompt lists tools, and calls as Python writes them, `[name(city="Paris")]`: ToolACE's shape."""

import json
import re
from collections.abc import Iterator
from typing import Any

from qtune.data.formats import BadRow, DataFormat, Message, RowFault, Values, kind_of
from qtune.data.formats.messages import read_turns, unread_of_turns
from qtune.data.formats.tool_calls import CALLED, bad_call, json_text, python_calls, tools_text

LISTED = re.compile(r"list of functions in JSON format that you can invoke:\s*(?=\[)")


def _read(values: Values, system: str | None) -> tuple[Message, ...]:
    turns = values["messages"]
    if not isinstance(turns, list):
        raise BadRow(RowFault.WRONG_SHAPE, f"the messages are {kind_of(turns)}, not a list")
    return read_turns({"messages": list(_plain_turns(turns)), "tools": _tools(values)}, system)


def _plain_turns(turns: list[Any]) -> Iterator[Any]:
    """The turns with calls and results as chat messages have them."""
    names: list[str] = []
    for number, turn in enumerate(turns, start=1):
        said = turn.get("value", turn.get("content")) if isinstance(turn, dict) else None
        role = turn.get("from", turn.get("role")) if isinstance(turn, dict) else None
        if role in ("assistant", "gpt") and isinstance(said, str) and CALLED.fullmatch(said):
            calls = python_calls(said, f"message {number}")
            names = [call.name for call in calls]
            functions = [{"name": call.name, "arguments": call.arguments} for call in calls]
            yield {"role": "assistant", "tool_calls": functions}
        elif role == "tool" and isinstance(said, str):
            yield from ({"role": "tool", "content": result} for result in _results(said, names))
        else:
            yield turn


def _results(said: str, names: list[str]) -> list[str]:
    """One for each call, where the text is a list of as many."""
    try:
        listed = json.loads(said)
    except (ValueError, RecursionError):
        return [said]
    is_each = isinstance(listed, list) and len(listed) == len(names) > 1
    return [json_text(result) for result in listed] if is_each else [said]


def _tools(values: Values) -> str:
    """Those that the system prompt lists; what else it says is how calls are written, and the template's to say."""
    text = values.get("system")
    listed = LISTED.search(text) if isinstance(text, str) else None
    if listed is None or not isinstance(text, str):
        return ""
    try:
        tools, _ = json.JSONDecoder().raw_decode(text, listed.end())
    except (ValueError, RecursionError):
        raise bad_call("the system prompt lists functions that are no JSON") from None
    return tools_text(tools)


def _is_meant(values: Values) -> bool:
    text = values.get("system")
    return isinstance(text, str) and LISTED.search(text) is not None


TOOLACE = DataFormat(
    name="toolace",
    description='turns that call as Python does, `[name(city="Paris")]`, tools in the system prompt',
    fields={"messages": ("conversations", "conversation"), "system": ("system",), "check": ()},
    needed=("messages", "system"),
    read=_read,
    tools=_tools,
    unread=unread_of_turns,
    is_meant=_is_meant,
    order=15,
)
