"""Folders: datasets that `datasets` saved, which it reads the same, and texts. Files in Arrow's two formats."""

import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.ipc
import pytest
from conftest import byte_tokenizer
from read_rows import read_rows

from qtune.audit.audit import audit
from qtune.data.prepare import prepare
from qtune.data.sources import Source
from qtune.errors import DataError
from qtune.recipe.schema import Data, Model, Recipe

ROWS = [
    {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "ä" * (i % 5 + 1)}], "id": i}
    for i in range(150)
]


@pytest.fixture
def saved(tmp_path) -> Path:
    """Rows out of order and over three files."""
    made = datasets.Dataset.from_list(ROWS[::-1]).select(range(149, -1, -1))
    made.save_to_disk(tmp_path / "saved", num_shards=3)
    return tmp_path / "saved"


def test_a_dataset_that_was_saved_is_read_as_datasets_reads_it(saved) -> None:
    rows = read_rows(str(saved)).rows
    assert [row.values for row in rows] == datasets.load_from_disk(saved).to_list() == ROWS
    assert [row.place for row in rows[:2]] == ["saved row 1", "saved row 2"]
    assert rows[-1].place == "saved row 150"


def test_it_is_trained_on_and_kept_until_a_file_of_it_changes(saved, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("QTUNE_CACHE", str(tmp_path / "cache"))
    recipe = Recipe(name="t", model=Model(base="demo"), data=Data(train=str(saved)))
    made = prepare(recipe, byte_tokenizer())
    assert made.report.rows_read == 150
    assert "from the cache" in prepare(recipe, byte_tokenizer()).report.notices[-1]
    one = sorted(saved.glob("*.arrow"))[1]
    one.write_bytes(one.read_bytes().replace("ä".encode() * 3, b"aaaaaa"))
    assert prepare(recipe, byte_tokenizer()).report.notices == ()
    assert Source(str(saved)).bytes == sum(path.stat().st_size for path in saved.glob("*.arrow"))


def test_a_file_of_it_that_is_gone_or_cut_is_named(saved) -> None:
    second = sorted(saved.glob("*.arrow"))[1]
    second.write_bytes(second.read_bytes()[:900])
    with pytest.raises(DataError, match=rf"{second.name}: is not readable as Arrow"):
        read_rows(str(saved))
    second.unlink()
    with pytest.raises(DataError, match=rf"{second.name}: is not readable as Arrow"):
        read_rows(str(saved))


@pytest.mark.parametrize("new", [pyarrow.ipc.new_stream, pyarrow.ipc.new_file])
def test_arrow_files_of_both_formats(tmp_path, new) -> None:
    table = pyarrow.Table.from_pylist(ROWS)
    with new(tmp_path / "rows.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    rows = read_rows(str(tmp_path / "rows.arrow")).rows
    assert [row.values for row in rows] == ROWS
    assert rows[99].place == "rows.arrow row 100"


def test_a_file_that_is_no_arrow(tmp_path) -> None:
    (tmp_path / "rows.arrow").write_text("question,answer\n")
    with pytest.raises(DataError, match=r"rows\.arrow: is not readable as Arrow"):
        read_rows(str(tmp_path / "rows.arrow"))


def texts(folder: Path) -> Path:
    (folder / "in").mkdir()
    (folder / "b.md").write_text("# Two\n\ntext\n")
    (folder / "a.txt").write_text("\none\r\n")
    (folder / "in" / "c.txt").write_text("three " * 40)
    return folder


def test_texts_of_a_folder_are_rows_by_name(tmp_path) -> None:
    rows = read_rows(str(texts(tmp_path))).rows
    assert [(row.place, row.values["text"]) for row in rows] == [
        ("a.txt:2", "one"),
        ("b.md:1", "# Two\n\ntext"),
        ("in/c.txt:1", "three " * 40),
    ]
    recipe = Recipe(name="t", model=Model(base="demo"), data=Data(train=str(tmp_path), max_tokens=64))
    report = prepare(recipe, byte_tokenizer()).report
    assert (report.rows_read, report.cut_texts, report.pieces) == (3, 1, 4)


def test_a_text_without_words_and_one_that_is_no_utf8_are_named_within_the_folder(tmp_path) -> None:
    texts(tmp_path)
    (tmp_path / "in" / "d.md").write_text("")
    (tmp_path / "e.md").write_text(" \n")
    rows = read_rows(str(tmp_path), on_bad_row="drop")
    assert [(row.place, row.reason) for row in rows.dropped] == [
        ("e.md:1", "is a file without a text"),
        ("in/d.md:1", "is a file without a text"),
    ]
    (tmp_path / "in" / "d.md").write_bytes(b"ok\n\xe4\n")
    with pytest.raises(DataError, match=r"in/d\.md:2: byte 0xe4 is not UTF-8"):
        read_rows(str(tmp_path), on_bad_row="drop")


def test_a_folder_is_checked(tmp_path, saved) -> None:
    (tmp_path / "texts").mkdir()
    for folder, rows in ((texts(tmp_path / "texts"), 3), (saved, 150)):
        found = audit(Data(train=str(folder)), byte_tokenizer(), lambda *words: None)
        assert (found.rows, found.sources[0].usable_rows) == (rows, rows)


def test_other_folders_are_refused(tmp_path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]))
    with pytest.raises(DataError, match="neither one of texts nor one that save_to_disk wrote"):
        read_rows(str(tmp_path))
