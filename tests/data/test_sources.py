"""Rows from a source: bad ones refused or counted, and no more than asked for."""

from pathlib import Path

import pytest
from read_rows import read_rows

from qtune.errors import DataError

GOOD = '{"question": "q", "answer": "a"}'


def write(folder: Path, content: str) -> str:
    (folder / "a.jsonl").write_text(content)
    return str(folder / "a.jsonl")


def test_bad_rows_are_dropped_and_counted_on_request(tmp_path) -> None:
    source = write(tmp_path, f"{GOOD}\nnull\n{GOOD}\n3\n")
    found = read_rows(source, on_bad_row="drop")
    assert len(found.rows) == 2
    assert [row.place for row in found.dropped] == ["a.jsonl:2", "a.jsonl:4"]
    with pytest.raises(DataError, match=r"a\.jsonl:2: is null.*\na\.jsonl:4: is a number"):
        read_rows(source)


def test_many_bad_rows_are_counted_not_listed(tmp_path) -> None:
    with pytest.raises(DataError, match="97 more rows like these"):
        read_rows(write(tmp_path, "null\n" * 100))


def test_max_rows(tmp_path) -> None:
    assert len(read_rows(write(tmp_path, f"{GOOD}\n" * 9), max_rows=4).rows) == 4
