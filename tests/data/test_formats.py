"""One raw row, read as each format; and every way a row can be wrong."""

import pytest

from qtune.data.formats import Conversation, Document, Message, read, recognise
from qtune.data.rows import Dropped, Row
from qtune.errors import DataError
from qtune.recipe.schema import Columns

PLAIN = Columns()
SYSTEM, USER, ASSISTANT = "system", "user", "assistant"


def turns(values: dict, system: str | None = None, mapped: Columns = PLAIN) -> tuple[tuple[str, str], ...]:
    item = read(Row(values, "r:1"), recognise(values.keys(), mapped), mapped, system)
    assert isinstance(item, Conversation), item
    return tuple((message.role, message.content) for message in item.messages)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"prompt": "q", "completion": "a"}, ((USER, "q"), (ASSISTANT, "a"))),
        ({"question": "q", "answer": "a", "source": "x"}, ((USER, "q"), (ASSISTANT, "a"))),
        ({"query": "q", "response": "a", "system": ""}, ((USER, "q"), (ASSISTANT, "a"))),
        ({"instruction": "q", "input": "x", "output": "a"}, ((USER, "q\n\nx"), (ASSISTANT, "a"))),
        (
            {"instruction": "q", "input": "", "output": "a", "system": "s", "history": [["p", "b"]]},
            ((SYSTEM, "s"), (USER, "p"), (ASSISTANT, "b"), (USER, "q"), (ASSISTANT, "a")),
        ),
        (
            {
                "messages": [
                    {"role": USER, "content": "q"},
                    {"role": ASSISTANT, "content": [{"type": "text", "text": "a"}]},
                ]
            },
            ((USER, "q"), (ASSISTANT, "a")),
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "human", "value": "q"},
                    {"from": "gpt", "value": "a"},
                ]
            },
            ((SYSTEM, "s"), (USER, "q"), (ASSISTANT, "a")),
        ),
        (
            {"system": "s", "conversation": [{"human": "q", "assistant": "a"}]},
            ((SYSTEM, "s"), (USER, "q"), (ASSISTANT, "a")),
        ),
    ],
)
def test_every_format_is_recognised(values, expected) -> None:
    assert turns(values) == expected


def test_plain_text_is_a_document() -> None:
    assert read(Row({"text": "t"}, "r:1"), "text", PLAIN, None) == Document("t", "r:1")


def test_columns_can_be_mapped() -> None:
    mapped = Columns(prompt="QUESTION", completion="final_decision", input="CONTEXT")
    values = {"QUESTION": "q", "CONTEXT": "c", "final_decision": "yes"}
    assert turns(values, mapped=mapped) == ((USER, "q\n\nc"), (ASSISTANT, "yes"))


def test_the_recipes_system_prompt_stands_where_a_row_has_none() -> None:
    assert turns({"prompt": "q", "completion": "a"}, system="s")[0] == (SYSTEM, "s")
    assert turns({"prompt": "q", "completion": "a", "system": "own"}, system="s")[0] == (SYSTEM, "own")
    chat = {
        "messages": [
            {"role": SYSTEM, "content": "own"},
            {"role": USER, "content": "q"},
            {"role": ASSISTANT, "content": "a"},
        ]
    }
    assert [turn for turn in turns(chat, system="s") if turn[0] == SYSTEM] == [(SYSTEM, "own")]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"question": "q", "answer": None}, "the answer is null"),
        ({"question": "q", "answer": "  "}, "the answer is empty"),
        ({"question": "q", "answer": 3.5}, "the answer is a number, not text"),
        ({"question": None, "answer": "a"}, "the prompt is null"),
        ({"messages": []}, "the list of messages is empty"),
        ({"messages": "hello"}, "the messages are text, not a list"),
        ({"messages": ["hello"]}, "message 1 is text, not an object"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "the role 'bot', which does not exist"),
        ({"messages": [{"role": USER, "content": "x"}]}, "the last message is the user's"),
        ({"messages": [{"role": USER, "content": None}]}, "the content of message 1 is null"),
        ({"messages": [{"role": USER, "content": [{"type": "image"}]}]}, "a part that is no text"),
        ({"messages": [{"role": ["x"], "content": "y"}]}, "which does not exist"),
        ({"instruction": "q", "output": "a", "history": "x"}, "the history is not a list"),
    ],
)
def test_a_bad_row_says_why(values, reason) -> None:
    item = read(Row(values, "r:7"), recognise(values.keys(), PLAIN), PLAIN, None)
    assert isinstance(item, Dropped)
    assert item.place == "r:7"
    assert reason in item.reason


def test_a_row_without_the_columns_of_the_first_says_so() -> None:
    assert read(Row({"x": "1"}, "r:2"), "alpaca", PLAIN, None) == Dropped(
        "r:2", "has no column for the prompt and the completion"
    )


def test_unknown_columns_list_what_would_work() -> None:
    with pytest.raises(DataError, match=r"no format has the columns 'a', 'b'.*\[data\.columns\]"):
        recognise(["a", "b"], PLAIN)


def test_messages_are_values() -> None:
    assert Message(USER, "x") == Message(USER, "x")
