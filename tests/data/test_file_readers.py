"""Every kind of file: rows with their places, faults with their lines, nothing lost in silence."""

import contextlib
import json
import random
import tracemalloc
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from read_rows import read_rows

from qtune.data import file_readers, text_files
from qtune.data.file_readers import read_file
from qtune.data.rows import RawRow
from qtune.errors import DataError

GOOD = '{"question": "q", "answer": "a"}'


def write(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


@pytest.mark.parametrize(
    ("name", "content", "values", "places"),
    [
        ("a.jsonl", '{"x": "1"}\n\n{"x": "2"}\n', [{"x": "1"}, {"x": "2"}], ["a.jsonl:1", "a.jsonl:3"]),
        ("a.jsonl", b'\xef\xbb\xbf{"x": "1"}\r\n{"x": "2"}', [{"x": "1"}, {"x": "2"}], ["a.jsonl:1", "a.jsonl:2"]),
        ("a.json", '[{"x": "1"}]', [{"x": "1"}], ["a.json row 1"]),
        ("a.json", '{"data": [{"x": "1"}]}', [{"x": "1"}], ["a.json row 1"]),
        ("a.json", '{"7": {"x": "1"}}', [{"id": "7", "x": "1"}], ["a.json row 1"]),
        (
            "a.csv",
            'x,y\n1,"two\nlines"\n3,4\n',
            [{"x": "1", "y": "two\nlines"}, {"x": "3", "y": "4"}],
            ["a.csv:2", "a.csv:4"],
        ),
        (
            "a.csv",
            b"\xef\xbb\xbfx,y\r\n1,2\r3,4\n",
            [{"x": "1", "y": "2"}, {"x": "3", "y": "4"}],
            ["a.csv:2", "a.csv:3"],
        ),
        ("a.tsv", "x\ty\n1\t2\n", [{"x": "1", "y": "2"}], ["a.tsv:2"]),
        ("a.txt", "\r\none\r\ntwo\r\n\r\n\r\nthree\r\n\r\n", [{"text": "one\ntwo\n\n\nthree"}], ["a.txt:2"]),
    ],
)
def test_each_kind_of_file(tmp_path, name, content, values, places) -> None:
    found = read_rows(write(tmp_path, name, content))
    assert [row.values for row in found.rows] == values
    assert [row.place for row in found.rows] == places


def test_a_cell_may_be_a_whole_document(tmp_path) -> None:
    """The csv module stops at 128 KiB a cell unless it is told otherwise."""
    found = read_rows(write(tmp_path, "a.csv", f"x,y\n{'long ' * 40_000},1\n"))
    assert len(found.rows[0].values["x"]) == 200_000


def test_parquet(tmp_path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"x": ["1", "2"]}), tmp_path / "a.parquet")
    assert [row.values for row in read_rows(str(tmp_path / "a.parquet")).rows] == [{"x": "1"}, {"x": "2"}]


def test_parquet_with_text_that_is_not_utf8_is_one_sentence(tmp_path) -> None:
    """Arrow stores any bytes as text, and Python fails on them only when they are read."""
    text = pyarrow.array([b"\xff"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"x": text}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="not readable as Parquet"):
        read_rows(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", "", "is empty"),
        ("a.jsonl", "null\n" + GOOD, "a.jsonl:1: is null"),
        ("a.jsonl", GOOD + "\n[1]", "a.jsonl:2: is an array"),
        ("a.jsonl", GOOD + '\n{"x": ', "a.jsonl:2: is not JSON: expecting value at the end of the line"),
        ("a.jsonl", GOOD + '\n{"x": "a\tb"}', "raw control character (0x09) at column 9"),
        ("a.jsonl", GOOD + "\n{'x': 1}", "at column 2"),
        ("a.jsonl", GOOD.encode() + b'\n{"x": "\xff"}', "a.jsonl:2: byte 0xff is not UTF-8"),
        ("a.jsonl", '{\n "x": 1\n}\n', "Name it .json"),
        ("a.jsonl", '[\n{"x": 1}\n]\n', "Name it .json"),
        ("a.jsonl", '{ "x": 1,\n "y": 2\n}\n', "Name it .json"),
        ("a.jsonl", f"[{GOOD}, {GOOD}]", "Name it .json"),
        ("a.jsonl", '{\n"x": 1\n}\n{\n"x": 2\n}\n', "spreads its JSON over several lines"),
        ("a.jsonl", '{"x": "a\n' + GOOD, "a.jsonl:1: is not JSON: unterminated string starting at column 7"),
        ("a.json", GOOD + "\n" + GOOD, "a.json:2: a second JSON value begins here. A file with one object a line"),
        ("a.json", '{"x":\n{"y" 1}}', "a.json:2: is not JSON: expecting ':' delimiter at column 6, before '1}}'"),
        ("a.json", '{"x": "a\nb"}', "a.json:1: has a line break inside a text"),
        ("a.json", '[{"x": "\x01"}]', "a.json:1: has a raw control character (0x01) at column 9; write it as \\u0001"),
        ("a.json", '{"question": "q", "answer": "a"}', "array of objects, or objects by id"),
        ("a.json", '{"7": {"x": "1"}, "8": "yes"}', "a.json row 2: is a string"),
        ("a.json", "3", "array of objects"),
        ("a.json", '[{"x": 1}, null]', "a.json row 2: is null"),
        ("a.csv", "x,y\n1,2,3\n", "a.csv:2: has 3 cells where the header has 2"),
        ("a.csv", "x,x\n1,2\n", "'x' is there twice"),
        ("a.csv", "x,\n1,2\n", "column 2 has no name"),
        ("a.csv", b"x,y\n1,\x002\n", "NUL"),
        ("a.csv", 'x,y\n1,2\n3,"4\n5,6\n', "a.csv:3: is not readable as CSV"),
        ("a.csv", b"PK\x03\x04....", "Excel"),
        ("a.jsonl", b"\x1f\x8b....", "gzip"),
        ("a.csv", "x,y\n".encode("utf-16"), "UTF-16"),
        ("a.parquet", "x,y\n1,2\n", "not readable as Parquet"),
        ("a.docx", "x", "does not read .docx"),
    ],
)
def test_a_fault_is_named(tmp_path, name, content, words) -> None:
    with pytest.raises(DataError) as fault:
        read_rows(write(tmp_path, name, content))
    assert words in str(fault.value)


def test_a_missing_file_names_the_nearest(tmp_path) -> None:
    write(tmp_path, "rows.jsonl", GOOD)
    with pytest.raises(DataError, match=r"Did you mean rows\.jsonl\?"):
        read_rows(str(tmp_path / "rwos.jsonl"))


def test_mutated_files_give_rows_or_one_clear_error(tmp_path) -> None:
    """Every line that holds anything is a row, a dropped row, or the reason the file is refused."""
    rng, read = random.Random(0), 0
    text = "".join(json.dumps({"question": f"q{i}", "answer": "ä" * i}) + "\n" for i in range(6)).encode()
    for number in range(500):
        content = bytearray(text)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(content))
            match rng.randrange(3):
                case 0:
                    content[at] = rng.randrange(256)
                case 1:
                    del content[at : at + rng.randint(1, 9)]
                case _:
                    content[at:at] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 5)))
        source = write(tmp_path, f"{number}.jsonl", bytes(content))
        with contextlib.suppress(DataError):
            found = read_rows(source, on_bad_row="drop")
            lines = [line for line in bytes(content).decode("utf-8-sig").split("\n") if line.strip()]
            assert len(found.rows) + len(found.dropped) == len(lines)
            read += 1
    assert 100 < read < 500  # both ends are reached


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("excel_file_named.tsv", "Excel"),
        ("one_broken_row.jsonl", "one_broken_row.jsonl:6"),
        ("pretty_printed_json_named.jsonl", "Name it .json"),
    ],
)
def test_real_messy_files(material, name, words) -> None:
    with pytest.raises(DataError) as fault:
        read_rows(str(material / "datasets" / "messy" / name))
    assert words in str(fault.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.tsv", "a.txt", "a.parquet"])
def test_memory_is_that_of_a_row_not_of_the_file(tmp_path, name) -> None:
    path, rows = tmp_path / name, 400
    if name == "a.parquet":
        table = pyarrow.table({"text": [f"{i} " + "x" * 100_000 for i in range(rows)]})
        pyarrow.parquet.write_table(table, path, row_group_size=10)
    else:
        line, header = {
            "a.jsonl": ('{{"text": "{0} {1}"}}\n', ""),
            "a.csv": ("{0},{1}\n", "n,text\n"),
            "a.tsv": ("{0}\t{1}\r", "n\ttext\r"),
            "a.txt": ("{0} {1}\n\n", ""),
        }[name]
        path.write_text(header + "".join(line.format(i, "x" * 100_000) for i in range(rows)), newline="")
    tracemalloc.start()
    read = sum(isinstance(item, RawRow) for item in read_file(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000 < rows * 100_000
    assert read == (rows if name != "a.txt" else -(-rows // 11))  # of a text, eleven lines of 100,000 make a mebibyte


@pytest.mark.parametrize(
    ("start", "line", "words"),
    [
        ("[\n", ' {"x": "1"},\n', "Name it .json"),
        ("[", '{"x": "1"}, ', "Name it .json"),
        ('{\n "a": [', ' {"x": "1"},\n', "Name it .json"),
        ('{\n"x": 1\n}\n', '{\n"x": 1\n}\n', "spreads its JSON over several lines"),
        ("", "[1]\n", "a.jsonl:1: is an array"),
        ('{"x": \n', '{"x": "1"}\n', "a.jsonl:1: is not JSON"),
    ],
)
def test_a_long_file_is_judged_by_its_start(tmp_path, start, line, words) -> None:
    """A block of it, though the whole was read for this once."""
    with pytest.raises(DataError) as fault:
        read_rows(write(tmp_path, "a.jsonl", start + line * 150_000))
    assert words in str(fault.value)


def test_bad_bytes_are_named_wherever_a_block_ends(tmp_path, monkeypatch) -> None:
    """A character may lie across two blocks, and a byte-order mark before the fault moved the byte that was named."""
    good = "\ufeff" + '{"x": "é☃𝄞"}\n' * 3
    for size in (1, 2, 3, 5, 8):
        monkeypatch.setattr(text_files, "BLOCK_BYTES", size)
        assert len(list(read_file(Path(write(tmp_path, "a.jsonl", good))))) == 3
        for broken in (b"\xff", "☃".encode()[:2]):
            with pytest.raises(DataError, match=f"a.jsonl:4: byte 0x{broken[0]:02x} is not UTF-8"):
                list(read_file(Path(write(tmp_path, "a.jsonl", good.encode() + b'{"x": "' + broken + b'"}'))))


def test_a_zip_named_csv_is_not_read_as_text(tmp_path) -> None:
    with zipfile.ZipFile(tmp_path / "a.csv", "w") as file:
        file.writestr("x", "y")
    with pytest.raises(DataError, match="an Excel workbook or zip archive"):
        read_rows(str(tmp_path / "a.csv"))


def test_a_document_larger_than_memory_should_hold_says_how_to_part_it(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(file_readers, "MOST_DOCUMENT_BYTES", 20)
    (tmp_path / "rows.json").write_text('[{"question": "a", "answer": "b"}]')
    with pytest.raises(DataError, match=r"one JSON document of 34 B.* jq -c '\.\[\]' rows\.json > rows\.jsonl"):
        read_rows(str(tmp_path / "rows.json"))
