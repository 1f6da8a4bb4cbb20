"""Excel workbooks: the sheet that is meant, what each kind of cell becomes, and what is refused."""

import datetime
import sys
from pathlib import Path
from typing import Any

import pytest
from read_rows import read_rows

from qtune.data.sources import Source
from qtune.errors import DataError

HEADER = ["Question ", "answer"]


def workbook(folder: Path, **sheets: list[list[Any]]) -> str:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.remove(book.active)
    for name, rows in sheets.items():
        sheet = book.create_sheet(name)
        for row in rows:
            sheet.append(row)
    book.save(folder / "a.xlsx")
    return str(folder / "a.xlsx")


def test_cells_of_every_kind_are_texts(tmp_path) -> None:
    day = datetime.datetime(2026, 12, 1)
    cells = [["ä", 42], [0.1 + 0.2, True], [], [day, day.replace(hour=9)], ["=1+1", "x"], [datetime.time(7, 5), None]]
    rows = read_rows(workbook(tmp_path, Sheet1=[HEADER, *cells], Other=[["z"]])).rows
    assert [list(row.values.values()) for row in rows] == [
        ["ä", "42"],
        ["0.3", "TRUE"],
        ["2026-12-01", "2026-12-01 09:00:00"],
        [None, "x"],  # nobody computed the formula
        ["07:05:00", None],
    ]
    assert list(rows[0].values) == ["Question", "answer"]
    assert [row.place for row in rows] == [f"a.xlsx:Sheet1:{number}" for number in (2, 3, 5, 6, 7)]


def test_the_sheet_is_named(tmp_path) -> None:
    path = workbook(tmp_path, One=[["x"], ["1"]], Two=[["x"], ["2"]])
    assert [row.values for row in Source.open(path).read()] == [{"x": "1"}]
    assert [row.values for row in Source.open(path, subset="Two").read()] == [{"x": "2"}]
    with pytest.raises(DataError, match=r"no sheet 'two', which data\.subset names\. It has One, Two\."):
        list(Source.open(path, subset="two").read())


def test_bad_rows_and_headers(tmp_path) -> None:
    rows = read_rows(workbook(tmp_path, S=[HEADER, ["#N/A", "x"], ["a", "b", "c"], ["q", "a"]]), on_bad_row="drop")
    assert [(row.place, row.reason) for row in rows.dropped] == [
        ("a.xlsx:S:2", "has a cell with the error #N/A"),
        ("a.xlsx:S:3", "has a value in column 3 where the header has 2"),
    ]
    assert len(rows.rows) == 1
    with pytest.raises(DataError, match=r"column 2 of sheet 'S' has no name.*unmerge"):
        read_rows(workbook(tmp_path, S=[["merged", None, "c"], ["1", "2", "3"]]))


def test_broken_and_encrypted_ones(tmp_path) -> None:
    path = Path(workbook(tmp_path, S=[HEADER, ["q", "a"]]))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match="is not readable as a workbook"):
        read_rows(str(path))
    path.write_bytes(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600))
    with pytest.raises(DataError, match="one with a password"):
        read_rows(str(path))


def test_without_openpyxl(tmp_path, monkeypatch) -> None:
    (tmp_path / "a.xlsx").write_bytes(b"PK\x03\x04" + bytes(600))
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(DataError, match="which openpyxl reads: pip install openpyxl"):
        read_rows(str(tmp_path / "a.xlsx"))
