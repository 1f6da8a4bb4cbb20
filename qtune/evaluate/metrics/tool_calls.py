"""Calls of tools: the right function with the right arguments, and no call where none is due.

A call is read in whatever spelling the base's template has: `<tool_call>` blocks (Hermes, Qwen), functions and
parameters as XML (Qwen3-Coder, Nemotron), JSON alone or in a list (Llama, Mistral, Granite), gpt-oss's channel, and
Python's own (LFM2, ToolACE).
"""

import json
import re
from typing import Any

from qtune.data.formats import BadRow
from qtune.data.formats.tool_calls import CALLED, python_calls, read_literal
from qtune.evaluate.metrics import Asked, Label, Marks, Metric

BLOCK = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|$)", re.DOTALL)
FUNCTION = re.compile(r"<function=([^>\s]+)>(.*?)(?:</function>|$)", re.DOTALL)
PARAMETER = re.compile(r"<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
CHANNEL = re.compile(r"to=functions\.([\w.-]+)[^{]*(\{.*\})\s*$", re.DOTALL)
NAMED = re.compile(
    r"^\s*([\w.-]+?)(?:[A-Za-z0-9]{9})?(\{.*\})\s*$", re.DOTALL
)  # Mistral's, its special tokens left out
NAMES, ARGUMENTS = ("name", "tool_name"), ("arguments", "parameters")
Called = tuple[str, Any]


class Spelled(str):
    """An argument that stands as plain text, be it a number or a list."""


def calls_in(answer: str) -> list[Called]:
    """Every call of an answer, name and arguments; one that cannot be read has the name "" and fits no other."""
    blocks = BLOCK.findall(answer)
    if blocks:
        return [call for block in blocks for call in _of_text(block)]
    if FUNCTION.search(answer):
        return _of_text(answer)
    channel = CHANNEL.search(answer)
    if channel:
        return [(channel[1], read_literal(channel[2]))]
    if CALLED.fullmatch(answer):
        return _of_python(answer)
    lines = [call for line in answer.splitlines() for call in _of_json(line)]
    named = NAMED.match(answer)
    return _of_json(answer) or lines or ([(named[1], read_literal(named[2]))] if named else [])


def _of_text(block: str) -> list[Called]:
    spelled = [
        (name, {k: Spelled(v) for k, v in PARAMETER.findall(within)}) for name, within in FUNCTION.findall(block)
    ]
    return spelled or _of_json(block) or [("", None)]


def _of_python(answer: str) -> list[Called]:
    try:
        return [(call.name, json.loads(call.arguments)) for call in python_calls(answer, "the answer")]
    except BadRow:
        return [("", None)]


def _of_json(text: str) -> list[Called]:
    """Calls of an object or a list; nothing where these are no calls."""
    value = read_literal(text.strip())
    calls = value if isinstance(value, list) else [value]
    named = [call.get("function", call) for call in calls if isinstance(call, dict)]
    named = [call for call in named if isinstance(call, dict) and any(key in call for key in NAMES)]
    return [(_first(call, NAMES), _first(call, ARGUMENTS)) for call in named] if len(named) == len(calls) else []


def _first(call: dict[str, Any], keys: tuple[str, ...]) -> Any:
    value: Any = next((call[key] for key in keys if key in call), {})
    return (read_literal(value) or value) if keys == ARGUMENTS and isinstance(value, str) else value


def same(one: Any, other: Any) -> bool:
    """Whether two arguments say the same: the order of keys does not matter, nor 2 or 2.0, but `true` is no number."""
    if isinstance(one, Spelled):
        return one == other or (not isinstance(other, str) and same(_plain(one), other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def _plain(spelled: str) -> Any:
    try:
        return json.loads(spelled)
    except (ValueError, RecursionError):
        return read_literal(spelled) if spelled[:1] in "[{" else {"True": True, "False": False}.get(spelled)


def tool_calls(answer: str, asked: Asked) -> Marks:
    """1 where the answer calls all that the reference calls, with its arguments and nothing more, else 0.

    `right function` and `right arguments` are of the rows that call, `no call where none is due` of the others. The
    order of several calls does not matter.
    """
    wanted, made = calls_in(asked.answer), calls_in(answer)
    if not wanted:
        kept = float(not made)
        return Marks(kept, {"no call where none is due": kept})
    left = list(made)
    for name, arguments in wanted:
        fitting = next((call for call in left if call[0] == name and same(call[1], arguments)), None)
        if fitting is not None:
            left.remove(fitting)
    is_right = not left and len(made) == len(wanted)
    named = sorted(str(name) for name, _ in made) == sorted(name for name, _ in wanted)
    return Marks(float(is_right), {"right function": float(named), "right arguments": float(is_right)})


METRIC = Metric(
    name="tool_calls",
    use="for rows that call tools",
    label=Label("right calls", "the tool and the arguments, and no call where none is due"),
    marks=tool_calls,
    order=7,
)
