"""Rows are made once: what is kept is what was made, broken entries are made again, and nothing is served stale."""

import json
import random
import shutil
import threading
import time
from datetime import datetime
from pathlib import Path

import pytest
from conftest import byte_tokenizer

from qtune import cache_dir
from qtune.data import token_cache
from qtune.data.prepare import prepare
from qtune.data.prepared import Prepared
from qtune.data.sources import Source
from qtune.data.token_cache import _dates_written, key_of
from qtune.errors import DataError, MachineError
from qtune.recipe.schema import Data, Model, Recipe, Train


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """Where entries stand."""
    monkeypatch.setenv(cache_dir.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"question": f"{i}?", "answer": "é" * (i % 9 + 1)}) + "\n" for i in range(60)))
    return path


def run(source: Path, seed: int = 0, tokenizer=None, **data: object) -> tuple[Prepared, bool]:
    """The rows, and whether they had to be made."""
    heard = []
    recipe = Recipe(name="t", model=Model(base="demo"), data=Data(train=str(source), **data), train=Train(seed=seed))
    prepared = prepare(recipe, tokenizer or byte_tokenizer(), lambda *words: heard.append(words))
    return prepared, bool(heard)


def entry_of(home: Path) -> Path:
    (entry,) = home.iterdir()
    return entry


def same(a: Prepared, b: Prepared) -> bool:
    """All but the notice that says where rows come from."""
    return {**vars(a), "report": {**vars(a.report), "notices": ()}} == {
        **vars(b),
        "report": {**vars(b.report), "notices": ()},
    }


def test_the_second_time_rows_come_from_the_cache_and_it_says_so(source, home) -> None:
    made, was_made = run(source, max_tokens=24, on_long="truncate", held_out_fraction=0.2)
    kept, was_made_again = run(source, max_tokens=24, on_long="truncate", held_out_fraction=0.2)
    assert (was_made, was_made_again) == (True, False)
    assert same(made, kept)
    assert made.report.truncated_rows > 0
    assert made.report.notices == ()
    assert "QTUNE_CACHE=off" in kept.report.notices[0]
    assert [path.name for path in home.parent.iterdir()] == ["tokens"]
    assert entry_of(home).stat().st_mode & 0o077 == 0  # the rows may be anything


def test_a_broken_entry_is_made_again(source, home) -> None:
    """Truncated, emptied, missing or with one bit changed, in any file of it."""
    rng = random.Random(0)
    made, _ = run(source)
    names = sorted(path.name for path in entry_of(home).iterdir())
    assert len(names) == 4
    for name in names:
        whole = (entry_of(home) / name).read_bytes()
        bit = rng.randrange(8 * len(whole))
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        for broken in (None, b"", whole[: len(whole) // 2], whole + b" ", bytes(flipped)):
            path = entry_of(home) / name
            path.unlink()
            if broken is not None:
                path.write_bytes(broken)
            again, was_made = run(source)
            assert was_made
            assert same(made, again)


def test_what_rows_follow_from_makes_them_anew(source, tmp_path) -> None:
    other = byte_tokenizer()
    other.chat_template = other.chat_template.replace("\n' + m", "\n\n' + m")
    larger = byte_tokenizer()
    larger.add_tokens(["é"])
    run(source)
    for change in ({"seed": 1}, {"max_tokens": 30}, {"packing": False}, {"tokenizer": other}, {"tokenizer": larger}):
        assert run(source, **change)[1]
        assert not run(source, **change)[1]
    assert not run(source)[1]
    source.write_text(source.read_text().replace("4?", "5?"))
    assert run(source)[1]


def test_a_folder_may_move_and_errors_name_the_file_where_it_is(source, tmp_path) -> None:
    run(source)
    moved = tmp_path / "elsewhere" / source.name
    moved.parent.mkdir()
    shutil.move(source, moved)
    prepared, was_made = run(moved)
    assert not was_made
    assert prepared.report.source == str(moved)
    with pytest.raises(DataError, match="there is no such file"):
        run(source)


def test_a_held_out_file_is_part_of_what_rows_follow_from(source, tmp_path) -> None:
    held_out = tmp_path / "held.jsonl"
    held_out.write_text('{"question": "a?", "answer": "b"}\n')
    made, _ = run(source, held_out=str(held_out))
    kept, was_made = run(source, held_out=str(held_out))
    assert not was_made
    assert same(made, kept)
    held_out.write_text('{"question": "a?", "answer": "c"}\n')
    assert run(source, held_out=str(held_out))[1]


def test_a_file_that_changes_while_it_is_read_is_refused(source, home) -> None:
    """Its rows were of the file before and of the file after, and a run went on with them."""
    recipe = Recipe(name="t", model=Model(base="demo"), data=Data(train=str(source)))
    with pytest.raises(DataError, match=r"rows\.jsonl: changed while it was read"):
        prepare(recipe, byte_tokenizer(), lambda *words: source.write_text('{"question": "a?", "answer": "b"}\n' * 60))
    assert list(home.iterdir()) == []


def at_once(source: Path) -> list[list[str]]:
    """What three processes are told that begin with the same rows, the second and third while the first is at it."""
    heard: list[list[str]] = [[], [], []]
    recipe = Recipe(name="t", model=Model(base="demo"), data=Data(train=str(source)))
    others = [threading.Thread(target=lambda i=i: prepare(recipe, byte_tokenizer(), told(i))) for i in (1, 2)]

    def told(number: int):
        def tell(what: str, done: int, total: int | None) -> None:
            heard[number].append(what)
            if number == 0 and len(heard[0]) == 1:
                for other in others:
                    other.start()
                while not (heard[1] and heard[2]):
                    time.sleep(0.01)

        return tell

    first = prepare(recipe, byte_tokenizer(), told(0))
    for other in others:
        other.join()
    assert len(first.train) > 50
    return [list(dict.fromkeys(words)) for words in heard]


def test_processes_that_begin_together_make_rows_once(source, home) -> None:
    """Every rank of a run would tokenise the same file."""
    waiting = "waiting for another process with these rows"
    assert at_once(source) == [["tokenising"], [waiting], [waiting]]
    assert [path.name for path in home.iterdir()] == [entry_of(home).name]


def test_where_nothing_is_kept_they_wait_for_one_and_not_for_each_other(source, home, monkeypatch) -> None:
    monkeypatch.setenv(cache_dir.SIZE_VARIABLE, "1KB")
    waiting = "waiting for another process with these rows"
    assert at_once(source) == [["tokenising"], [waiting, "tokenising"], [waiting, "tokenising"]]
    assert list(home.iterdir()) == []


def test_a_disk_without_room_for_the_tokens_is_told_before_they_are_made(source, monkeypatch) -> None:
    monkeypatch.setattr(token_cache, "MOST_UNWRITTEN_BYTES", 1000)
    full = shutil.disk_usage("/")._replace(free=2048)
    monkeypatch.setattr(token_cache.shutil, "disk_usage", lambda folder: full)
    heard = []
    recipe = Recipe(name="t", model=Model(base="demo"), data=Data(train=str(source)))
    with pytest.raises(MachineError, match=r"take about 9\.2 KiB of disk, and 2\.0 KiB are free .* QTUNE_CACHE"):
        prepare(recipe, byte_tokenizer(), lambda *words: heard.append(words))
    assert heard == []
    monkeypatch.setattr(token_cache, "MOST_UNWRITTEN_BYTES", 1 << 20)  # memory would hold them
    assert len(run(source)[0].train) > 50


@pytest.mark.parametrize("asked", [cache_dir.OFF, "no folder"])
def test_without_a_cache_rows_are_made_every_time(source, tmp_path, monkeypatch, asked) -> None:
    """A folder that cannot be made is one that is not there: no error."""
    (tmp_path / "no folder").write_text("a file")
    monkeypatch.setenv(cache_dir.VARIABLE, asked if asked == cache_dir.OFF else str(tmp_path / asked))
    monkeypatch.setattr(token_cache.tempfile, "tempdir", str(tmp_path / "temporary"))
    first, _ = run(source)
    again, was_made = run(source)
    assert was_made
    assert same(first, again)
    assert not list((tmp_path / "temporary").glob("*"))


def test_nothing_is_left_of_rows_that_are_refused(source, home) -> None:
    with pytest.raises(DataError):
        run(source, max_tokens=8)
    assert list(home.iterdir()) == []


def test_the_longest_unused_goes_first_and_strangers_stay(source, home, monkeypatch) -> None:
    run(source, seed=1)
    size = sum(file.stat().st_size for file in entry_of(home).iterdir())
    (home / "mine").mkdir()
    monkeypatch.setattr(cache_dir, "LARGEST_BYTES", int(2.5 * size))
    run(source, seed=2)
    assert not run(source, seed=1)[1]
    run(source, seed=3)
    assert not run(source, seed=1)[1]
    assert run(source, seed=2)[1]
    assert len(list(home.iterdir())) == 3
    monkeypatch.setattr(cache_dir, "LARGEST_BYTES", size // 2)
    run(source, seed=4)
    assert len(list(home.iterdir())) == 3  # what fits nowhere drives nothing out
    assert (home / "mine").is_dir()


LLAMA = '{%- if strftime_now is defined %}{%- set date = strftime_now("%d %b %Y") %}{%- else %}{%- endif %}'
NOW, LATER, TOMORROW = datetime(2026, 3, 4, 9, 30), datetime(2026, 3, 4, 23, 59), datetime(2026, 3, 5, 0, 1)


@pytest.mark.parametrize(
    ("template", "dates"),
    [
        ("{{ messages }}", []),
        (LLAMA, ["04 Mar 2026"]),
        ("{{ strftime_now('%Y') }}{{ strftime_now( '%m' ) }}", ["2026", "03"]),
        ("{{ strftime_now('%H:%M') }}", None),
        ("{{ strftime_now(form) }}", None),
        ("{% set now = strftime_now %}{{ now('%Y') }}", None),
    ],
)
def test_the_date_is_part_of_the_key_and_the_time_has_none(template, dates) -> None:
    assert _dates_written(template, NOW) == dates
    assert _dates_written(template, LATER) == dates


def test_tomorrow_is_another_day() -> None:
    assert _dates_written(LLAMA, NOW) != _dates_written(LLAMA, TOMORROW)


def recipe_for(train: str) -> Recipe:
    return Recipe(name="t", model=Model(base="demo"), data=Data(train=train))


def test_a_tokenizer_that_is_a_program_has_no_key(tmp_path) -> None:
    class Own(type(byte_tokenizer())):
        pass

    (tmp_path / "a.jsonl").write_text("{}")
    recipe, source = recipe_for(str(tmp_path / "a.jsonl")), Source.open(str(tmp_path / "a.jsonl"))
    tokenizer = byte_tokenizer()
    assert key_of(recipe, [source], tokenizer) is not None
    tokenizer.__class__ = Own
    assert key_of(recipe, [source], tokenizer) is None


def test_what_cannot_be_told_apart_has_no_key(tmp_path) -> None:
    recipe = recipe_for("someone/rows")
    for dataset in ([{"x": "1"}], None):
        assert key_of(recipe, [Source("/nowhere/rows.jsonl", dataset)], byte_tokenizer()) is None
