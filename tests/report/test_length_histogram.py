"""Lengths as bars of text and as a picture."""

import builtins
from pathlib import Path

import pytest
from rich.console import Console

from qtune.audit.length_stats import Bar, TokenCounts
from qtune.errors import MachineError, UserError
from qtune.report.length_histogram import draw, histogram, picture_path

COUNTS = TokenCounts(
    rows=161,
    tokens=9000,
    trained_tokens=4000,
    median=50,
    percentile_95=120,
    longest=(),
    max_tokens=100,
    long_rows=11,
    lost_trained_tokens=500,
    bars=(Bar(17, 32, 20), Bar(33, 64, 100), Bar(65, 128, 40), Bar(129, 256, 1)),
)


def lines(counts: TokenCounts) -> list[str]:
    console = Console(width=100, color_system=None)
    with console.capture() as capture:
        console.print(histogram(counts))
    return [line.rstrip() for line in capture.get().splitlines()]


def test_bars_are_as_long_as_their_share_and_the_smallest_is_seen() -> None:
    _, short, longest, middle, least = lines(COUNTS)
    assert [line.count("█") for line in (short, longest, middle)] == [8, 40, 16]
    assert "▎" in least or "▍" in least


def test_rows_over_the_limit_say_so() -> None:
    _, short, longest, middle, least = lines(COUNTS)
    assert "max_tokens" not in short + longest
    assert middle.endswith("data.max_tokens = 100")
    assert least.endswith("over")


def test_a_picture_is_drawn_into_a_file_or_a_folder(tmp_path: Path) -> None:
    path = picture_path(tmp_path)
    assert path == tmp_path / "tokens.png"
    draw(COUNTS, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert picture_path(tmp_path / "x.svg") == tmp_path / "x.svg"


@pytest.mark.parametrize(("name", "words"), [("no/x.png", "there is no folder"), ("x.doc", "must end in .png")])
def test_a_place_that_cannot_be(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        picture_path(tmp_path / name)


def test_without_matplotlib_it_says_what_brings_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: object, **kwargs: object) -> object:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MachineError, match=r"pip install '\.\[plots\]'"):
        picture_path(tmp_path)
