"""A bar where someone looks and waits, and nothing anywhere else."""

import io

import pytest
from rich.console import Console

from qtune.report import waiting


def shown(is_terminal: bool) -> str:
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=80)
    with waiting.rows_shown(console) as tell:
        tell("reading", 4096, None)
        tell("tokenising", 1024, 4096)
    return console.file.getvalue()


def test_a_long_wait_shows_what_is_done_and_how_far(monkeypatch) -> None:
    monkeypatch.setattr(waiting, "SECONDS_BEFORE_BAR", 0.0)
    text = shown(is_terminal=True)
    assert "reading" in text
    assert "1,024 of 4,096 rows" in text


@pytest.mark.parametrize(("is_terminal", "seconds"), [(True, 60.0), (False, 0.0)])
def test_a_moment_and_a_pipe_show_nothing(monkeypatch, is_terminal, seconds) -> None:
    monkeypatch.setattr(waiting, "SECONDS_BEFORE_BAR", seconds)
    assert shown(is_terminal) == ""
