"""Calls in the spellings that templates have, held against a reference."""

from types import SimpleNamespace

import pytest

from qtune.data.formats import Call, Message
from qtune.data.tokenize import answer_of
from qtune.evaluate.metrics import METRICS
from qtune.evaluate.metrics.tool_calls import calls_in, same, tool_calls

ONE = Call("get_weather", '{"city": "Paris", "days": 2}')
TWO = Call("get_weather", '{"city": "Rome", "days": 2}')


def score(answer: str, *calls: Call, said: str = "") -> float:
    reference = answer_of(Message("assistant", said, calls=calls))
    return tool_calls(answer, SimpleNamespace(prompt_text="q", answer=reference, check="")).score


@pytest.mark.parametrize(
    "answer",
    [
        '<tool_call>\n{"name": "get_weather", "arguments": {"days": 2.0, "city": "Par\\u0069s"}}\n</tool_call>',
        'I look.\n<tool_call>{"arguments":{"days":2,"city":"Paris"},"name":"get_weather"}',
        '{"name": "get_weather", "parameters": {"city": "Paris", "days": 2}}',
        '[{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\", \\"days\\": 2}", "id": "123456789"}]',
        '[{"tool_call_id": "0", "tool_name": "get_weather", "parameters": {"city": "Paris", "days": 2}}]',
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n2\n</parameter>\n"
        "</function>\n</tool_call>",
        ' to=functions.get_weathercommentary json{"city": "Paris", "days": 2}'.replace("commentary", " commentary"),
        '[get_weather(city="Paris", days=2)]',
        'get_weather74196fe72{"city": "Paris", "days": 2}',
        'get_weather{"city": "Paris", "days": 2}',
    ],
)
def test_every_spelling_of_a_call_is_the_call(answer: str) -> None:
    assert score(answer, ONE) == 1
    assert score(answer, TWO) == 0
    assert score(answer) == 0


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("It is warm.", 0),
        ('<tool_call>{"name": "get_time", "arguments": {"city": "Paris", "days": 2}}</tool_call>', 0),
        ('<tool_call>{"name": "get_weather", "arguments": {"city": "Paris", "days": "2"}}</tool_call>', 0),
        ('<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}</tool_call>', 0),
        ("<tool_call>nothing</tool_call>", 0),
        ("", 0),
    ],
)
def test_a_wrong_call_or_none_is_wrong(answer: str, right: int) -> None:
    assert score(answer, ONE) == right


def test_calls_side_by_side_may_come_in_any_order_and_none_too_many() -> None:
    both = answer_of(Message("assistant", "", calls=(TWO, ONE)))
    assert score(both, ONE, TWO) == 1
    assert score(both, ONE) == 0
    assert score(answer_of(Message("assistant", "", calls=(ONE, ONE))), ONE, TWO) == 0
    lines = '{"name": "get_weather", "arguments": {"city": "Rome", "days": 2}}\n' + (
        '{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}'
    )
    assert score(lines, ONE, TWO) == 1


def test_no_call_is_right_where_none_is_due() -> None:
    assert score("I do not know.", said="No tool does that.") == 1
    assert score(answer_of(Message("assistant", "", calls=(ONE,))), said="No tool does that.") == 0
    assert score('{"Paris": 2}', said="No tool does that.") == 1


def test_parts_say_what_was_wrong() -> None:
    asked = SimpleNamespace(prompt_text="q", answer=answer_of(Message("assistant", "", calls=(ONE,))), check="")
    marks = tool_calls('{"name": "get_weather", "arguments": {}}', asked)
    assert marks.parts == {"right function": 1.0, "right arguments": 0.0}


@pytest.mark.parametrize(
    ("one", "other", "are_same"),
    [(2, 2.0, True), (True, 1, False), ([1, 2], [2, 1], False), ({"a": [True]}, {"a": [True]}, True), ("2", 2, False)],
)
def test_arguments_are_compared_as_json_not_as_text(one: object, other: object, are_same: bool) -> None:
    assert same(one, other) == are_same


def test_text_is_no_call() -> None:
    for text in ("Just words.", "[1] see above", '["a", "b"]', "f(x) = 2", "{", "<b>x</b>"):
        assert calls_in(text) == []
    assert "tool_calls" in METRICS
