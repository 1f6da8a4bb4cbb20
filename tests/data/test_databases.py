"""SQLite databases: the table that is meant, in the order of rowid, read only; what is no table of texts is refused."""

import contextlib
import sqlite3
from pathlib import Path

import pytest
from conftest import byte_tokenizer
from read_rows import read_rows

from qtune.audit.audit import audit
from qtune.data.sources import Source
from qtune.errors import DataError
from qtune.recipe.schema import Data

CHATS = "CREATE TABLE chats (id INTEGER PRIMARY KEY, question TEXT, answer TEXT);"
ROWS = "INSERT INTO chats VALUES (9, 'c?', 'C'), (2, 'a?', 'A'), (5, 'b?', NULL);"
NOTES = "CREATE TABLE notes (text TEXT);"


def database(folder: Path, script: str, name: str = "my rows?.db") -> str:
    path = folder / name
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript(script)
    return str(path)


def test_rows_come_by_rowid_and_nothing_is_written(tmp_path) -> None:
    path = database(tmp_path, CHATS + ROWS + "CREATE INDEX backwards ON chats (answer DESC, question, id)")
    content = Path(path).read_bytes()
    assert [(row.values["question"], row.values["answer"], row.place) for row in read_rows(path).rows] == [
        ("a?", "A", "my rows?.db:chats row 1"),
        ("b?", None, "my rows?.db:chats row 2"),
        ("c?", "C", "my rows?.db:chats row 3"),
    ]
    assert Path(path).read_bytes() == content
    assert [each.name for each in tmp_path.iterdir()] == ["my rows?.db"]


def test_the_table_or_view_is_named(tmp_path) -> None:
    view = 'CREATE VIEW "the ""good""" AS SELECT question, answer FROM chats WHERE answer NOT NULL ORDER BY id DESC;'
    path = database(tmp_path, CHATS + ROWS + NOTES + view)
    rows = list(Source.open(path, subset='the "good"').read())
    assert [row.values for row in rows] == [{"question": "c?", "answer": "C"}, {"question": "a?", "answer": "A"}]
    with pytest.raises(DataError, match=r'several tables: chats, notes, the "good"\. Name one with data\.subset'):
        read_rows(path)
    with pytest.raises(DataError, match=r"has no table 'chat', which data\.subset names\. It has chats, notes"):
        list(Source.open(path, subset="chat").read())


def test_a_table_without_rowid_comes_by_its_key(tmp_path) -> None:
    script = "CREATE TABLE t (k TEXT PRIMARY KEY, v INT) WITHOUT ROWID; INSERT INTO t VALUES ('b', 1), ('a', 2.5)"
    assert [row.values for row in read_rows(database(tmp_path, script)).rows] == [
        {"k": "a", "v": 2.5},
        {"k": "b", "v": 1},
    ]


def test_bytes_are_refused_by_row(tmp_path) -> None:
    bad = "INSERT INTO notes VALUES ('one'), (x'00ff'), (CAST(x'66fc72' AS TEXT)), ('two');"
    every = read_rows(database(tmp_path, NOTES + bad), on_bad_row="drop")
    assert [row.values["text"] for row in every.rows] == ["one", "two"]
    assert [(row.place, "column 'text' holds bytes" in row.reason) for row in every.dropped] == [
        ("my rows?.db:notes row 2", True),
        ("my rows?.db:notes row 3", True),
    ]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"\x8f" * 4096, "is no SQLite database, or an encrypted one"),
        (b"SQLite format 3\0" + b"\x8f" * 4096, "is not readable as a SQLite database"),
    ],
)
def test_what_is_no_database(tmp_path, content, told) -> None:
    (tmp_path / "a.sqlite3").write_bytes(content)
    with pytest.raises(DataError, match=told):
        read_rows(str(tmp_path / "a.sqlite3"))


def test_a_cut_database_and_one_without_tables(tmp_path) -> None:
    many = "".join(f"INSERT INTO notes VALUES ('{'x' * 900} {i}');" for i in range(40))
    cut = Path(database(tmp_path, NOTES + "BEGIN;" + many + "COMMIT;"))
    cut.write_bytes(cut.read_bytes()[:9000])
    with pytest.raises(DataError, match="is not readable as a SQLite database"):
        read_rows(str(cut))
    with pytest.raises(DataError, match="without a table"):
        read_rows(database(tmp_path, NOTES + "DROP TABLE notes", "none.db"))


def test_changes_that_are_not_written_yet(tmp_path) -> None:
    path = database(tmp_path, CHATS)
    with contextlib.closing(sqlite3.connect(path)) as writer:
        writer.execute("PRAGMA journal_mode = WAL")
        writer.executescript(ROWS)
        with pytest.raises(DataError, match=r"unwritten changes in my rows\?\.db-wal\. Close the program"):
            read_rows(path)
    assert len(read_rows(path).rows) == 3


def test_check_takes_the_table_that_is_named(tmp_path) -> None:
    rows = "".join(f"INSERT INTO chats (question, answer) VALUES ('What is {i}?', 'It is {i * 7}.');" for i in range(9))
    data = Data(train=database(tmp_path, CHATS + NOTES + "BEGIN;" + rows + "COMMIT;"), subset="chats")
    assert audit(data, byte_tokenizer(), lambda *told: None).sources[0].usable_rows == 9
