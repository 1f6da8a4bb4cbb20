"""As much of Go's text/template as an Ollama template here uses, read from Go's documentation.

Actions: range with index and value, if, else if, else, end, assignment, string constants, field paths; eq, ne, and.
"""

import json
import re
from dataclasses import dataclass, field
from typing import Any

ACTION = re.compile(r"\{\{(- )?\s*((?:\"(?:\\.|[^\"\\])*\"|[^\"])*?)\s*( -)?\}\}", re.DOTALL)
WORD = re.compile(r'"(?:\\.|[^"\\])*"|\(|\)|[^\s()]+')


@dataclass
class Node:
    action: str
    text: str = ""
    branches: list[tuple[str, list["Node"]]] = field(default_factory=list)


def render(template: str, messages: list[dict[str, str]]) -> str:
    """What Ollama would make of `messages`; `.System` are the system prompts among them."""
    system = "\n\n".join(message["Content"] for message in messages if message["Role"] == "system")
    nodes, rest = _parse(_pieces(template))
    assert not rest
    return _run(nodes, {".": {"Messages": messages, "System": system}})


def _pieces(template: str) -> list[tuple[str, str]]:
    """(kind, text), white space taken off beside {{- and -}}."""
    pieces, at, trim = [], 0, False
    for found in ACTION.finditer(template):
        text = template[at : found.start()]
        text = text.lstrip() if trim else text
        pieces.append(("text", text.rstrip() if found[1] else text))
        pieces.append(("action", found[2]))
        at, trim = found.end(), bool(found[3])
    text = template[at:]
    return [*pieces, ("text", text.lstrip() if trim else text)]


def _parse(pieces: list[tuple[str, str]]) -> tuple[list[Node], list[tuple[str, str]]]:
    nodes: list[Node] = []
    while pieces:
        (kind, text), *pieces = pieces
        if kind == "text":
            nodes.append(Node("text", text))
        elif text == "end" or text.startswith("else"):
            return nodes, [(kind, text), *pieces]
        elif text.startswith(("if ", "range ")):
            node = Node(text.split()[0])
            condition = text.partition(" ")[2]
            while True:
                body, ((_, closing), *pieces) = _parse(pieces)
                node.branches.append((condition, body))
                if closing == "end":
                    break
                condition = closing.removeprefix("else").strip().removeprefix("if").strip()
            nodes.append(node)
        else:
            nodes.append(Node("value", text))
    return nodes, []


def _run(nodes: list[Node], scope: dict[str, Any]) -> str:
    return "".join(_one(node, scope) for node in nodes)


def _one(node: Node, scope: dict[str, Any]) -> str:
    if node.action == "text":
        return node.text
    if node.action == "if":
        chosen = next((body for condition, body in node.branches if not condition or _value(condition, scope)), [])
        return _run(chosen, scope)
    if node.action == "range":
        ((names, body),) = node.branches
        index, value, source = re.fullmatch(r"(\$\w+), (\$\w+) := (\S+)", names).groups()
        out = ""
        for number, item in enumerate(_value(source, scope)):
            scope |= {index: number, value: item}
            out += _run(body, scope)
        return out
    if assigned := re.fullmatch(r"(\$\w+) :?= (.+)", node.text):
        scope[assigned[1]] = _value(assigned[2], scope)
        return ""
    return str(_value(node.text, scope))


def _value(text: str, scope: dict[str, Any]) -> Any:
    value, rest = _call(WORD.findall(text), scope)
    assert not rest, text
    return value


def _call(words: list[str], scope: dict[str, Any]) -> tuple[Any, list[str]]:
    if words[0] not in ("eq", "ne", "and"):
        return _operand(words, scope)
    name, rest, values = words[0], words[1:], []
    while rest and rest[0] != ")":
        value, rest = _operand(rest, scope)
        values.append(value)
    first, second = values
    return {"eq": first == second, "ne": first != second, "and": second if first else first}[name], rest


def _operand(words: list[str], scope: dict[str, Any]) -> tuple[Any, list[str]]:
    word, *rest = words
    if word == "(":
        value, (closing, *rest) = _call(rest, scope)
        assert closing == ")"
        return value, rest
    if word.startswith('"'):
        return json.loads(word), rest
    if word.isdigit():
        return int(word), rest
    variable, *path = word.split(".")
    value = scope["." if variable in ("", "$") else variable]
    for part in path:
        value = value[part]
    return value, rest
