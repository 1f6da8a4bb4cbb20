"""What is being done, said where someone looks and in a pipe."""

import io
import os
import sys

import pytest
from rich.console import Console

from qtune.report.progress_line import Doing


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_one_line_moves_and_nothing_stays() -> None:
    screen = Screen()
    console = Console(file=screen, force_terminal=True, force_interactive=True, width=80, _environ={"TERM": "xterm"})
    with Doing(console) as doing:
        doing("planning")
        doing._progress.refresh()
        doing.rows("tokenising", 1024, 4096)
        doing._progress.refresh()
        for said in ("starting", "planning", "1,024 of 4,096 rows"):
            assert said in screen.getvalue()
        assert "━" in screen.getvalue()
        screen.truncate(0)
        doing.rows("comparing", 7, None)
        doing._progress.refresh()
        assert "━" not in screen.getvalue()  # the bar of what was counted before stood on, full
    text = screen.getvalue()
    for said in ("comparing", "7 rows", "0:00:00"):
        assert said in text
    assert text.endswith("\x1b[2K")  # the line is erased
    assert text.count("\n") <= 1


def test_elsewhere_each_thing_is_a_line_when_it_begins() -> None:
    lines = io.StringIO()
    with Doing(Console(file=io.StringIO()), lines) as doing:
        doing("planning")
        assert lines.getvalue() == "planning ...\n"
        for done in range(3):
            doing.rows("tokenising", done, None)
        doing.tensors(1, 2, "lm_head")
    assert lines.getvalue() == "planning ...\ntokenising ...\n"


def test_a_reader_that_goes_away_ends_the_lines_and_no_more() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone:
        doing = Doing(None, gone)
        doing("planning")
        doing("loading")


def test_a_library_that_asks_nobody_is_told_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Doing() as doing:
        doing("planning")
        doing.console.print("unseen")
        print("seen", file=sys.stderr)
    assert capsys.readouterr() == ("", "seen\n")
