"""Every sentence of the formats has its kind, and every kind its words."""

import pytest

from qtune.audit.issue_types import KINDS, UNUSABLE, WHOLE_FILE
from qtune.data.formats import FORMATS
from qtune.data.rows import Dropped, RawRow, parse_row


def fault_of(values: dict, form: str) -> str:
    row = parse_row(RawRow(values, "r:1"), FORMATS[form], {}, None)
    assert isinstance(row, Dropped)
    return row.fault


def chat(*turns: object) -> dict:
    return {"messages": list(turns)}


USER, BOT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("values", "form", "code"),
    [
        ({"question": "q", "answer": None}, "question-answer", "missing-answer"),
        ({"question": "q", "answer": " "}, "question-answer", "missing-answer"),
        ({"question": "q"}, "question-answer", "missing-answer"),
        ({"answer": "a"}, "question-answer", "missing-prompt"),
        ({"question": "", "answer": "a"}, "question-answer", "missing-prompt"),
        (chat(USER), "messages", "missing-answer"),
        (chat(), "messages", "empty-text"),
        (chat(USER, {"role": "assistant", "content": ""}), "messages", "empty-text"),
        (chat(USER, {"role": "assistant", "content": None}), "messages", "empty-text"),
        (chat({"role": "bot", "content": "x"}, BOT), "messages", "unknown-role"),
        (chat({"content": "x"}, BOT), "messages", "unknown-role"),
        (chat(USER, {"role": "assistant", "tool_calls": [1]}), "messages", "tool-call"),
        (chat("x"), "messages", "wrong-shape"),
        ({"messages": "x"}, "messages", "wrong-shape"),
        ({"text": 3}, "text", "wrong-shape"),
        ({"text": None}, "text", "empty-text"),
        ({"text": "\ud800"}, "text", "half-character"),
    ],
)
def test_a_row_that_cannot_be_used_has_a_kind(values: dict, form: str, code: str) -> None:
    assert fault_of(values, form) == code


def test_every_kind_that_can_be_a_fault_has_words() -> None:
    assert {*UNUSABLE, *WHOLE_FILE} <= KINDS.keys()
