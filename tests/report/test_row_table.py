"""A row is read without colour too, and with it where there is one."""

import pytest
from rich.console import Console

from qtune.audit.row_preview import ShownRow, Stretch
from qtune.report.row_table import row_table

STRETCHES = (
    Stretch("<|user|>one?", False, False),
    Stretch("first\x07", True, False),
    Stretch(" cut<|end|>", True, True),
)


def row(not_used: str | None = None, stretches: tuple[Stretch, ...] = STRETCHES) -> ShownRow:
    return ShownRow("rows.jsonl:17", 12, "messages", stretches, 20, 8, 3, 17, not_used, ("<|end|>", "<|user|>"))


def shown(one: ShownRow, **settings: object) -> str:
    console = Console(width=80, **settings)
    with console.capture() as capture:
        console.print(row_table(one))
    return capture.get()


def test_without_colour_marks_say_what_is_trained_and_a_line_where_it_is_cut() -> None:
    lines = shown(row(), color_system=None).splitlines()
    assert lines[0] == "rows.jsonl:17 · row 12 · messages"
    assert lines[1] == "20 tokens, 8 trained, 3 trained ones lost; data.max_tokens = 17"
    assert "<|user|>one?»first␇«" in lines
    cut = next(number for number, line in enumerate(lines) if "cut here, behind 17 tokens" in line)
    assert lines[cut + 1] == "» cut<|end|>«"


def test_with_colour_trained_text_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[1;32m»first" in shown(row(), color_system="standard", force_terminal=True)


def test_no_color_is_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    text = shown(row(), color_system="standard", force_terminal=True)
    assert "»first␇«" in text
    assert "32m" not in text


def test_a_row_that_is_not_used_says_why_and_has_nothing_else_to_show() -> None:
    text = shown(row("the answer is null", ()), color_system=None)
    assert text.splitlines() == ["rows.jsonl:17 · row 12 · messages", "not used: the answer is null"]
