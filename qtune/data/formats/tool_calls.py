"""Tools and calls of them, in the spellings that rows have: read, written in one way, and held against one another.

Tools are kept as the JSON text of a list in OpenAI's shape, `[{"type": "function", "function": {"name": ...,
"parameters": a JSON schema}}]`, arguments of a call as the JSON text of an object.
"""

import ast
import functools
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from qtune.data.formats import BadRow, Call, RowFault, Values, kind_of

# Names of types that are not JSON schema's, as Python and the sets made with it have them.
TYPES = {
    **dict.fromkeys(("str", "string", "text"), "string"),
    **dict.fromkeys(("int", "integer", "long"), "integer"),
    **dict.fromkeys(("float", "double", "number"), "number"),
    **dict.fromkeys(("bool", "boolean"), "boolean"),
    **dict.fromkeys(("dict", "object", "map"), "object"),
    **dict.fromkeys(("list", "array", "tuple", "set"), "array"),
    **dict.fromkeys(("none", "null"), "null"),
}
FITS: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "object": (dict,),
    "array": (list,),
    "null": (type(None),),
}
IN_TEXT = re.compile(r"\s*<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
CALLED = re.compile(r"\s*\[\s*[\w./ -]+\(.*\)\s*\]\s*", re.DOTALL)  # as Python does, in a list
CONSTANTS = {"true": True, "false": False, "null": None, "none": None}


def bad_call(reason: str) -> BadRow:
    return BadRow(RowFault.TOOL_CALL, reason)


def json_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def tools_text(value: Any) -> str:
    """The tools of a row, a list or the JSON text of one, in OpenAI's shape; "" for none.

    Raises BadRow for what is no list of tools.
    """
    if value in (None, "", [], {}):
        return ""
    tools = _listed(value)
    return json_text([_tool(number, tool) for number, tool in enumerate(tools, start=1)]) if tools else ""


def _listed(value: Any) -> list[Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise bad_call("the tools are text that is no JSON: a list of tools is needed") from None
    tools = [value] if isinstance(value, dict) else value
    if not isinstance(tools, list):
        raise bad_call(f"the tools are {kind_of(tools)}, not a list")
    return [_one_of_text(tool) if isinstance(tool, str) else tool for tool in tools]


def _one_of_text(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise bad_call("the list of tools holds text that is no JSON") from None


def _tool(number: int, tool: Any) -> Values:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise bad_call(f'tool {number} has no name: a tool is {{"name": ..., "parameters": ...}}')
    if not isinstance(function.get("parameters") or {}, dict):
        raise bad_call(f"the parameters of the tool {function['name']} are {kind_of(function['parameters'])}")
    own = {key: value for key, value in function.items() if key != "type"}
    return {"type": "function", "function": own | {"parameters": _schema(own.get("parameters") or {})}}


def _schema(parameters: Values) -> Values:
    """A JSON schema as it is; one is made of `{"city": {"type": "str", "default": ""}}`, as xLAM has it."""
    if isinstance(parameters.get("type"), str) or not parameters or "properties" in parameters:
        return parameters or {"type": "object", "properties": {}}
    if not all(isinstance(each, dict) for each in parameters.values()):
        return parameters
    names = {name: str(each.get("type", "")) for name, each in parameters.items()}
    needed = [
        name
        for name, each in parameters.items()
        if "optional" not in names[name].lower() and "default" not in each and each.get("required") is not False
    ]
    properties = {name: {**each, **_type_of(names[name])} for name, each in parameters.items()}
    return {"type": "object", "properties": properties, "required": needed}


def _type_of(name: str) -> Values:
    """JSON schema's type of `List[int]` or `str, optional`; nothing where there is none."""
    outer = re.match(r"(?:Optional\[)?\s*([A-Za-z]+)", name)
    known = TYPES.get(outer[1].lower()) if outer else None
    inner = re.search(r"\[\s*([A-Za-z]+)\s*\]+", name) if known == "array" else None
    items = TYPES.get(inner[1].lower()) if inner else None
    return ({"type": known} if known else {}) | ({"items": {"type": items}} if items else {})


def call_of(value: Any, where: str) -> Call:
    """A call of `{"name": ..., "arguments": an object or its JSON text}`, in OpenAI's `function` or without.

    Raises BadRow; `where` ends its sentence, as in `message 3`.
    """
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise bad_call(f"a call in {where} has no name")
    given = function.get("arguments", function.get("parameters"))
    own_id = value.get("id") or value.get("tool_call_id") or ""
    return Call(function["name"], _arguments(given, function["name"], where), str(own_id))


def _arguments(given: Any, name: str, where: str) -> str:
    if isinstance(given, str) and given.strip():
        try:
            given = json.loads(given)
        except (ValueError, RecursionError):
            raise bad_call(f"the arguments of the call of {name} in {where} are no JSON: {given[:60]!r}") from None
    if given in (None, ""):
        given = {}
    if not isinstance(given, dict):
        raise bad_call(f"the arguments of the call of {name} in {where} are {kind_of(given)}, not an object")
    return json_text(given)


def calls_of(value: Any, where: str) -> tuple[Call, ...]:
    """Calls of a list, of one object, or of the JSON text of either. Raises BadRow."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise bad_call(f"the call in {where} is no JSON: {value[:60]!r}") from None
    calls = value if isinstance(value, list) else [value]
    return tuple(call_of(call, where) for call in calls)


def calls_in_text(text: str, where: str) -> tuple[str, tuple[Call, ...]]:
    """What stands around `<tool_call>` blocks of an answer, and the calls in them. Raises BadRow."""
    calls = [call for block in IN_TEXT.findall(text) for call in calls_of(read_literal(block) or block, where)]
    return IN_TEXT.sub("", text).strip() if calls else text, tuple(calls)


def read_literal(text: str) -> Any:
    """An object or a list, as JSON or, in Hermes' first sets, as Python writes it; None for anything else."""
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(value, dict | list):
            return value
    return None


def python_calls(said: str, where: str) -> list[Call]:
    """`[A name(city="Paris"), other(n=[1, 2])]`: names may have spaces, so the calls are parted by hand."""
    inner = said.strip()[1:-1]
    calls, start, depth, quote = [], 0, 0, ""
    for at, character in enumerate(inner):
        if quote:
            quote = "" if character == quote and inner[at - 1] != "\\" else quote
        elif character in "\"'":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
            if depth == 0:
                calls.append(_call(inner[start : at + 1], where))
                start = at + 1
    if not calls or depth or inner[start:].strip(" ,\n"):
        raise bad_call(f"the call in {where} cannot be read: {said.strip()[:60]!r}")
    return calls


def _call(text: str, where: str) -> Call:
    name, _, arguments = text.strip(" ,\n").partition("(")
    try:
        tree = ast.parse(f"f({arguments}", mode="eval").body
        assert isinstance(tree, ast.Call)
        if tree.args:
            raise ValueError
        given = {argument.arg: _value(argument.value) for argument in tree.keywords if argument.arg}
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise bad_call(f"the call in {where} cannot be read: {text.strip()[:60]!r}") from None
    return Call(name.strip(), json_text(given))


def _value(node: ast.expr) -> Any:
    """A literal of Python, in which `true`, `false` and `null` may stand as JSON has them. Raises ValueError."""
    if isinstance(node, ast.Name) and node.id.lower() in CONSTANTS:
        return CONSTANTS[node.id.lower()]
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(each) for each in node.elts]
    if isinstance(node, ast.Dict):
        return {_value(key): _value(value) for key, value in zip(node.keys, node.values, strict=True) if key}
    return ast.literal_eval(node)


def as_text(call: Call) -> str:
    """A call as a reference is shown and compared, whatever the template writes."""
    return f'<tool_call>\n{{"name": {json_text(call.name)}, "arguments": {call.arguments}}}\n</tool_call>'


def faults_of(calls: tuple[Call, ...], tools: str) -> Iterator[tuple[str, str]]:
    """What of calls the row's own tools do not allow: (`unknown-tool` or `bad-arguments`, a clause)."""
    schemas = _schemas(tools)
    for call in calls:
        if call.name not in schemas:
            known = ", ".join(list(schemas)[:6]) or "none"
            yield "unknown-tool", f"calls {call.name}, which is none of its tools: {known}"
        else:
            for told in _misfits(json.loads(call.arguments), schemas[call.name]):
                yield "bad-arguments", f"calls {call.name} {told}"


@functools.lru_cache(maxsize=256)  # sets of rows share their tools
def _schemas(tools: str) -> dict[str, Values]:
    functions = [tool["function"] for tool in json.loads(tools or "[]")]
    return {function["name"]: function["parameters"] for function in functions}


def _misfits(arguments: Values, schema: Values) -> Iterator[str]:
    """Clauses behind the name of what is called: `without city, which it needs`."""
    properties = schema.get("properties")
    needed = schema.get("required")
    for name in needed if isinstance(needed, list) else ():
        if isinstance(name, str) and name not in arguments:
            yield f"without {name}, which it needs"
    if not isinstance(properties, dict):
        return
    for name, value in arguments.items():
        if name not in properties:
            if not schema.get("additionalProperties"):
                yield f"with {name}, which it does not take"
        elif isinstance(properties[name], dict):
            told = _misfit(value, properties[name])
            if told:
                yield f"with {name} = {json_text(value)[:60]}, {told}"


def _misfit(value: Any, schema: Mapping[str, Any]) -> str | None:
    allowed = schema.get("enum")
    if isinstance(allowed, list) and value not in allowed:
        return f"which is none of {', '.join(map(json_text, allowed[:6]))}"
    named = schema.get("type")
    names = [
        TYPES.get(each.lower()) for each in (named if isinstance(named, list) else [named]) if isinstance(each, str)
    ]
    if not names or None in names or any(_is_a(value, name) for name in names if name):
        return None
    return f"which is {kind_of(value)}, not {' or '.join(name for name in names if name)}"


def _is_a(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    whole = name == "integer" and isinstance(value, float) and value.is_integer()
    return whole or isinstance(value, FITS[name])
