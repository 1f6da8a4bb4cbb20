"""Rows that call tools: every public shape read the same, and what is wrong with one said."""

import copy
import json
import random
from collections import Counter
from typing import Any

import pytest

from qtune.audit.row_checks import look_at
from qtune.data.formats import FORMATS, Call
from qtune.data.formats.tool_calls import faults_of, tools_text
from qtune.data.rows import Conversation, Dropped, RawRow, as_learned, parse_row, recognise
from qtune.errors import DataError
from qtune.recipe.schema import Data

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
}
FUNCTION = {"name": "get_weather", "description": "Weather.", "parameters": SCHEMA}
TOOL = {"type": "function", "function": FUNCTION}
ARGUMENTS = {"city": "Paris", "days": 2}
CALLED = {"name": "get_weather", "arguments": ARGUMENTS}
OPENAI = [
    {"role": "user", "content": "Weather in Paris?"},
    {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "type": "function", "function": CALLED}]},
    {"role": "tool", "tool_call_id": "c1", "content": "21 C"},
    {"role": "assistant", "content": "It is 21 C."},
]
AS_TEXT = [{**OPENAI[1], "tool_calls": [{"function": {**CALLED, "arguments": json.dumps(ARGUMENTS)}}]}]
LEGACY = [
    {"role": "assistant", "content": "", "function_call": {**CALLED, "arguments": json.dumps(ARGUMENTS)}},
    {"role": "function", "name": "get_weather", "content": "21 C"},
]
SHAREGPT = [
    {"from": "human", "value": "Weather in Paris?"},
    {"from": "function_call", "value": json.dumps(CALLED)},
    {"from": "observation", "value": "21 C"},
    {"from": "gpt", "value": "It is 21 C."},
]
HERMES = [
    {
        "from": "system",
        "value": f"You call functions.\n<tools>\n{json.dumps([TOOL])}\n</tools>\nAnswer in <tool_call>.",
    },
    SHAREGPT[0],
    {"from": "gpt", "value": f"<tool_call>\n{CALLED}\n</tool_call>"},
    {"from": "tool", "value": "<tool_response>\n21 C\n</tool_response>"},
    SHAREGPT[3],
]
GLAIVE = {
    "system": "SYSTEM: You are a helpful assistant with access to the following functions. Use them if required -\n"
    + json.dumps(FUNCTION, indent=4),
    "chat": "USER: Weather in Paris?\n\n\nASSISTANT: <functioncall> "
    + '{"name": "get_weather", "arguments": \''
    + json.dumps(ARGUMENTS)
    + "'} <|endoftext|>\n\n\n"
    + "FUNCTION RESPONSE: 21 C\n\n\nASSISTANT: It is 21 C. <|endoftext|>\n\n\n",
}
TOOLACE = {
    "system": "You are an expert. Here is a list of functions in JSON format that you can invoke:\n"
    + json.dumps([FUNCTION])
    + ". \nShould you decide to return the function call(s), ...",
    "conversations": [
        {"from": "user", "value": "Weather in Paris?"},
        {"from": "assistant", "value": '[get_weather(city="Paris", days=2)]'},
        {"from": "tool", "value": "21 C"},
        {"from": "assistant", "value": "It is 21 C."},
    ],
}


def read(values: dict, system: str | None = None) -> Conversation | Dropped:
    row = RawRow(values, "r:1")
    return parse_row(row, recognise("auto", [row], {}), {}, system)


@pytest.mark.parametrize(
    ("values", "form", "number"),
    [
        ({"messages": OPENAI, "tools": [TOOL]}, "messages", "c1"),
        ({"messages": OPENAI, "tools": json.dumps([TOOL])}, "messages", "c1"),
        ({"messages": [OPENAI[0], *AS_TEXT, *OPENAI[2:]], "tools": [FUNCTION]}, "messages", "000000001"),
        ({"messages": [OPENAI[0], *LEGACY, OPENAI[3]], "functions": [FUNCTION]}, "messages", "000000001"),
        ({"conversations": SHAREGPT, "tools": json.dumps([FUNCTION])}, "sharegpt", "000000001"),
        ({"conversations": HERMES}, "sharegpt", "000000001"),
        (GLAIVE, "glaive", "000000001"),
        (TOOLACE, "toolace", "000000001"),
    ],
)
def test_every_shape_is_one_conversation(values: dict, form: str, number: str) -> None:
    row = RawRow(values, "r:1")
    assert recognise("auto", [row], {}).name == form
    item = read(values)
    assert isinstance(item, Conversation), item
    assert [message.role for message in item.messages] == ["user", "assistant", "tool", "assistant"]
    _, called, result, answer = item.messages
    assert (called.content, called.calls) == ("", (Call("get_weather", json.dumps(ARGUMENTS), number),))
    assert (result.content, result.call_id, result.name) == ("21 C", number, "get_weather")
    assert answer.content == "It is 21 C."
    assert json.loads(item.tools) == [TOOL]
    assert item.unused == ()


def test_xlam_rows_end_with_their_calls_and_get_a_schema() -> None:
    tool = {"name": "f", "description": "d", "parameters": {"a": {"type": "str"}, "b": {"type": "List[int], optional"}}}
    answers = [{"name": "f", "arguments": {"a": "x"}}, {"name": "f", "arguments": {"a": "y"}}]
    item = read({"query": "q", "tools": json.dumps([tool]), "answers": json.dumps(answers), "id": 3}, "Be brief.")
    assert isinstance(item, Conversation)
    assert [message.role for message in item.messages] == ["system", "user", "assistant"]
    assert [call.arguments for call in item.messages[2].calls] == ['{"a": "x"}', '{"a": "y"}']
    parameters = json.loads(item.tools)[0]["function"]["parameters"]
    assert parameters["required"] == ["a"]
    assert parameters["properties"]["b"] == {"type": "array", "items": {"type": "integer"}}
    assert item.unused == ("id",)


def test_toolace_names_have_spaces_and_one_message_has_every_result() -> None:
    said = '[Market Trends API(kind="A, (b]", n=[1, 2], deep={"x": true}), Other()]'
    results = [{"name": "Market Trends API", "results": 1}, {"name": "Other", "results": 2}]
    turns = [
        {"from": "user", "value": "q"},
        {"from": "assistant", "value": said},
        {"from": "tool", "value": json.dumps(results)},
        {"from": "assistant", "value": "a"},
    ]
    item = read({"system": TOOLACE["system"], "conversations": turns})
    assert isinstance(item, Conversation), item
    first, second = item.messages[1].calls
    assert (first.name, json.loads(first.arguments)) == (
        "Market Trends API",
        {"kind": "A, (b]", "n": [1, 2], "deep": {"x": True}},
    )
    assert (second.name, second.arguments) == ("Other", "{}")
    assert [json.loads(m.content)["results"] for m in item.messages if m.role == "tool"] == [1, 2]


def test_calls_one_after_another_are_calls_of_one_message() -> None:
    other = {"name": "get_weather", "arguments": {"city": "Rome"}}
    turns = [SHAREGPT[0], SHAREGPT[1], {"from": "function_call", "value": json.dumps(other)}]
    turns += [SHAREGPT[2], {"from": "observation", "value": "25 C"}, SHAREGPT[3]]
    item = read({"conversations": turns, "tools": [FUNCTION]})
    assert isinstance(item, Conversation), item
    assert [len(message.calls) for message in item.messages] == [0, 2, 0, 0, 0]
    assert [message.call_id for message in item.messages][2:4] == ["000000001", "000000002"]


def with_turns(*turns: dict) -> dict:
    return {"messages": [OPENAI[0], *turns], "tools": [TOOL]}


def calling(*ids: str, arguments: object = ARGUMENTS) -> dict:
    calls = [{"id": each, "function": {"name": "get_weather", "arguments": arguments}} for each in ids]
    return {"role": "assistant", "tool_calls": calls}


def result(number: str) -> dict:
    return {"role": "tool", "tool_call_id": number, "content": "21 C"}


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (with_turns(calling("a"), OPENAI[3]), "message 3 comes before the result of the call of get_weather"),
        (with_turns(calling("a", "b"), result("a"), OPENAI[3]), "message 4 comes before the result"),
        (with_turns(calling("a", "b"), result("b"), result("a"), OPENAI[3]), "but the call 'a' comes first"),
        (with_turns(calling("a"), result("z"), OPENAI[3]), "answers the call 'z', which nobody made"),
        (with_turns(result("a"), OPENAI[3]), "message 2 is a result, and no call before it waits for one"),
        (with_turns(calling("a", arguments="{city: Paris}")), "call of get_weather in message 2 are no JSON"),
        (with_turns(calling("a", arguments=[1])), "are a list, not an object"),
        (with_turns({"role": "assistant", "tool_calls": [{"function": {}}]}), "a call in message 2 has no name"),
        ({**with_turns(OPENAI[3]), "tools": "hammer, saw"}, "the tools are text that is no JSON"),
        ({**with_turns(OPENAI[3]), "tools": [{"description": "x"}]}, "tool 1 has no name"),
        ({"query": "q", "tools": [FUNCTION], "answers": "[]"}, "the answers hold no call"),
        ({"query": "q", "tools": [FUNCTION], "answers": "{"}, "the call in the answers is no JSON"),
        ({**GLAIVE, "chat": "nothing"}, "the chat has no USER: and ASSISTANT:"),
        (
            {**TOOLACE, "conversations": [OPENAI[0], {"from": "assistant", "value": "[f(1)]"}]},
            "the call in message 2 cannot be read",
        ),
    ],
)
def test_what_is_wrong_with_a_call_is_said(values: dict, reason: str) -> None:
    item = read(values)
    assert isinstance(item, Dropped), item
    assert reason in item.reason


@pytest.mark.parametrize(
    ("name", "arguments", "told"),
    [
        ("get_weather", {"city": "Paris"}, []),
        ("get_weather", {"city": "Paris", "days": 2.0}, []),
        ("get_time", {}, ["calls get_time, which is none of its tools: get_weather"]),
        ("get_weather", {"days": 1}, ["calls get_weather without city, which it needs"]),
        ("get_weather", {"city": "x", "hour": 1}, ["calls get_weather with hour, which it does not take"]),
        ("get_weather", {"city": 3}, ["calls get_weather with city = 3, which is a number, not string"]),
        (
            "get_weather",
            {"city": "x", "days": True},
            ["calls get_weather with days = true, which is true or false, not integer"],
        ),
    ],
)
def test_calls_are_held_against_their_schema(name: str, arguments: dict, told: list[str]) -> None:
    calls = (Call(name, json.dumps(arguments)),)
    assert [clause for _, clause in faults_of(calls, tools_text([TOOL]))] == told


def test_an_enum_names_what_is_allowed() -> None:
    schema = {"type": "object", "properties": {"unit": {"type": "string", "enum": ["C", "F"]}}}
    tools = tools_text([{"name": "f", "parameters": schema}])
    (fault,) = faults_of((Call("f", '{"unit": "K"}'),), tools)
    assert fault == ("bad-arguments", 'calls f with unit = "K", which is none of "C", "F"')


def test_every_format_of_calls_has_a_file_of_its_own() -> None:
    assert {"messages", "sharegpt", "xlam", "glaive", "toolace"} <= FORMATS.keys()


def test_published_calls_are_read_without_a_mapping(material) -> None:
    rows = json.loads((material / "datasets/formats/glaive_toolcall_en_demo.json").read_text(encoding="utf-8"))
    items = [read(row) for row in rows]
    assert not [item.reason for item in items if isinstance(item, Dropped)]
    assert sum(bool(message.calls) for item in items for message in item.messages) > 100
    faults = [told for item in items for m in item.messages for told in faults_of(m.calls, item.tools)]
    assert len(faults) < len(items) / 20, faults[:3]


THINKING = {"role": "assistant", "content": "<think>hm</think>a", "reasoning_content": "x", "train": True, "weight": 1}
GOOD = (
    {"messages": OPENAI, "tools": [TOOL]},
    {"messages": OPENAI, "tools": json.dumps([TOOL])},
    {"conversations": SHAREGPT, "tools": json.dumps([FUNCTION])},
    {"conversations": HERMES},
    GLAIVE,
    TOOLACE,
    {"query": "q", "tools": [FUNCTION], "answers": [CALLED]},
    {"messages": [OPENAI[0], THINKING]},
    {"question": "q", "answer": "a", "thinking": "hm"},
)
JUNK = (
    *(None, "", 0, 1.5, True, [], {}, "x", [1], {"a": 1}, "{", "[]", "</think>", "<tool_call>", "\ud800", float("nan")),
    *(-1, 10**30, [[["x"]]], {"type": {"a": 1}}, [{"a": 1}]),
)


def places_in(value: object, above: tuple = ()) -> list[tuple]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [above, *(place for key, each in inner for place in places_in(each, (*above, key)))]


def broken(rng: random.Random, values: dict) -> dict:
    """A row with one to three things in it that are another, gone, or there twice."""
    values = copy.deepcopy(values)
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = [place for place in places_in(values) if place]
        *above, key = rng.choice(places) if places else ("x",)
        inner: Any = values
        for each in above:
            inner = inner[each]
        if not places or rng.random() < 0.6:
            inner[key] = copy.deepcopy(rng.choice(JUNK))
        elif rng.random() < 0.5:
            del inner[key]
        elif isinstance(inner[key], str) and inner[key]:
            at = rng.randrange(len(inner[key]))
            inner[key] = inner[key][:at] + rng.choice("\"}<\\(' ") + inner[key][at + 1 :]
        elif isinstance(inner, list):
            inner.insert(key, copy.deepcopy(rng.choice(inner)))
    return values


@pytest.mark.parametrize("rows", [400, pytest.param(10_000, marks=pytest.mark.long)])
def test_a_broken_row_is_read_or_said_to_be_broken(rows: int) -> None:
    """A tool whose `required` held an object ended the check of all rows."""
    rng, settings = random.Random(0), [Data(train="x", thoughts=each) for each in ("train", "show", "drop")]
    kinds: Counter[str] = Counter()
    for _ in range(rows):
        row = RawRow(broken(rng, rng.choice(GOOD)), "r:1")
        try:
            form = recognise("auto", [row], {})
        except DataError:
            continue
        item = as_learned(parse_row(row, form, {}, None), rng.choice(settings))
        kinds[type(item).__name__] += 1
        if isinstance(item, Conversation):
            look_at([item])
    assert kinds["Conversation"] > rows / 10
    assert kinds["Dropped"] > rows / 10


def test_a_schema_that_is_none_is_no_fault_of_a_call() -> None:
    tools = tools_text([{"name": "f", "parameters": {"type": "object", "properties": {}, "required": [{"a": 1}]}}])
    assert not list(faults_of((Call("f", "{}"),), tools))
