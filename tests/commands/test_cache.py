"""`qtune cache`: what is kept is listed, goes when it is told to, and nothing else goes with it."""

import json
from pathlib import Path

import pytest

from qtune import cache_dir, cli


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of three entries and two files that are no entries."""
    monkeypatch.setenv(cache_dir.VARIABLE, str(tmp_path))
    for number, (kind, what) in enumerate((("tokens", "a.jsonl"), ("nf4", "org/base"), ("nf4", "org/other"))):
        stage = cache_dir.new_folder(cache_dir.folder(kind))
        assert stage is not None
        (stage / "weights").write_bytes(bytes(3_000_000))
        cache_dir.keep(kind, f"{number:064x}", stage, what, {})
    (tmp_path / "bases").mkdir()
    (tmp_path / "bases" / "a.json").write_text("{}")
    (tmp_path / "nf4" / "mine").mkdir()
    return tmp_path


def test_what_is_kept_is_listed(home: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["cache"]) == 0
    listed = capsys.readouterr().out
    assert "tokenised rows of a.jsonl, used " in listed
    assert "2.9 MiB  bases in 4 bits of org/base" in listed
    assert f"{home}: 8.6 MiB of at most " in listed
    assert cli.main(["cache", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["of"] for row in rows] == ["a.jsonl", "org/base", "org/other"]


@pytest.mark.parametrize(("arguments", "left"), [(["--clear"], []), (["--clear", "nf4"], ["a.jsonl"])])
def test_what_is_cleared_goes_and_nothing_else(
    home: Path, capsys: pytest.CaptureFixture, arguments: list[str], left: list[str]
) -> None:
    assert cli.main(["cache", *arguments, "--yes"]) == 0
    assert "removed: " in capsys.readouterr().out
    assert [entry.what for entry in cache_dir.entries()] == left
    assert (home / "nf4" / "mine").is_dir()
    assert (home / "bases" / "a.json").is_file()


def test_without_a_terminal_nothing_goes_unasked(home: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["cache", "--clear"]) == 2
    assert "Give --yes" in capsys.readouterr().err
    assert len(cache_dir.entries()) == 3


def test_a_size_that_is_none(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv(cache_dir.SIZE_VARIABLE, "much")
    assert cli.main(["cache"]) == 2
    assert "QTUNE_CACHE_SIZE='much' is no size. Write it as 30GiB" in capsys.readouterr().err


def test_no_cache(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv(cache_dir.VARIABLE, cache_dir.OFF)
    assert cli.main(["cache"]) == 0
    assert "nothing is kept between runs" in capsys.readouterr().out


def test_the_user_says_how_much(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry that was unused for longest goes, whatever its kind."""
    monkeypatch.setenv(cache_dir.SIZE_VARIABLE, "7MB")
    assert cache_dir.make_room(1)
    assert [entry.what for entry in cache_dir.entries()] == ["org/base", "org/other"]
