"""A compressed file is what is in it: the same rows, places and faults, and what is cut short is told."""

import bz2
import gzip
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from conftest import byte_tokenizer
from read_rows import read_rows

from qtune.audit.audit import audit
from qtune.data import text_files
from qtune.data.sources import Source
from qtune.errors import DataError
from qtune.recipe.schema import Data

PACKED: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": lambda content: pyarrow.compress(content, "zstd", asbytes=True),
}
CONTENTS = {
    "rows.jsonl": b'\xef\xbb\xbf{"question": "a", "answer": "\xc3\xa9"}\n\n{"question": "b", "answer": "c"}\n{"q\n',
    "rows.json": b'[{"question": "a", "answer": "b"}]',
    "rows.csv": b'question;answer\r\na;"b\r\nc"\r\nd;\xe4hnlich\r\n',
    "rows.tsv": b"question\tanswer\na\tb\n",
    "rows.txt": b"one\r\n\r\n two\n",
}


@pytest.mark.parametrize("suffix", PACKED)
@pytest.mark.parametrize("name", CONTENTS)
def test_rows_are_those_of_the_file_within(tmp_path, suffix, name) -> None:
    plain, packed = tmp_path / name, tmp_path / f"{name}{suffix}"
    plain.write_bytes(CONTENTS[name])
    packed.write_bytes(PACKED[suffix](CONTENTS[name]))
    expected, rows = (read_rows(str(path), on_bad_row="drop") for path in (plain, packed))
    assert [row.values for row in rows.rows] == [row.values for row in expected.rows] != []
    for mine, theirs in zip((*rows.rows, *rows.dropped), (*expected.rows, *expected.dropped), strict=True):
        assert mine.place == theirs.place.replace(name, packed.name)
    assert Source(str(packed)).count_rows(None) == Source(str(plain)).count_rows(None)
    assert (Source(str(packed)).notice or "").replace(suffix, "") == (Source(str(plain)).notice or "")


@pytest.mark.parametrize("suffix", PACKED)
def test_several_files_packed_one_behind_the_other_are_one(tmp_path, suffix) -> None:
    path = tmp_path / f"rows.jsonl{suffix}"
    parts = [json.dumps({"question": f"{i}?", "answer": "a" * i}).encode() + b"\n" for i in range(9)]
    path.write_bytes(b"".join(map(PACKED[suffix], parts)))
    assert len(read_rows(str(path)).rows) == 9


@pytest.mark.parametrize("suffix", PACKED)
def test_a_file_that_is_cut_short_or_none_of_its_kind_is_refused(tmp_path, suffix) -> None:
    path, dice = tmp_path / f"rows.jsonl{suffix}", random.Random(0)
    lines = [json.dumps({"question": f"{dice.getrandbits(400):x}", "answer": "a"}) for _ in range(5000)]
    whole = PACKED[suffix]("\n".join(lines).encode())
    flawed = [] if suffix == ".zst" else [whole[:99] + b"\xff" * 500 + whole[599:]]  # pyarrow writes no checksum
    for content in (whole[: len(whole) // 2], b"question: none", *flawed):
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"rows\.jsonl\{suffix}: is no whole \{suffix} file \(.+\)\."):
            read_rows(str(path))
    path.write_bytes(PACKED[suffix](b""))
    with pytest.raises(DataError, match="is empty"):
        read_rows(str(path))


def test_every_zstd_file_that_is_cut_is_refused(tmp_path) -> None:
    """pyarrow gives what is there and says nothing. Frames of one block and of many, of one byte repeated, none."""
    path, dice = tmp_path / "rows.txt.zst", random.Random(0)
    for content in (b"a", dice.randbytes(999), b"x" * 300_000, dice.randbytes(300_000), b"ab" * 200_000):
        whole = b"\x50\x2a\x4d\x18\x03\0\0\0abc" + pyarrow.compress(content, "zstd", asbytes=True)
        path.write_bytes(whole)
        assert b"".join(text_files.blocks_of(path)) == content
        for _ in range(20):
            path.write_bytes(whole[: dice.randrange(12, len(whole))])
            with pytest.raises(DataError, match="is no whole"):
                b"".join(text_files.blocks_of(path))


def test_it_is_checked_as_what_is_in_it(tmp_path) -> None:
    good = b'{"question": "a", "answer": "b"}\n'
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(good * 3 + b'{"question": "\xe9t\xe9", "answer": "b"}\n'))
    found = audit(Data(train=str(tmp_path / "rows.jsonl.gz")), byte_tokenizer(), lambda *words: None)
    assert found.sources[0].usable_rows == 4
    assert [place.place for place in found.groups.by_code["not-utf8"].places] == ["rows.jsonl.gz:4"]


def test_names_and_contents_that_differ(tmp_path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(gzip.compress(b"{}"))
    with pytest.raises(DataError, match=r"compressed with gzip\. Have its name end in \.gz"):
        read_rows(str(tmp_path / "rows.jsonl"))
    (tmp_path / "rows.parquet.gz").write_bytes(gzip.compress(b"PAR1...."))
    with pytest.raises(DataError, match=r"is a compressed \.parquet\. Unpack it first"):
        read_rows(str(tmp_path / "rows.parquet.gz"))
    (tmp_path / "rows.exe.gz").write_bytes(gzip.compress(b"MZ"))
    with pytest.raises(DataError, match=r"does not read \.exe\."):
        read_rows(str(tmp_path / "rows.exe.gz"))


def test_memory_holds_a_block_of_what_is_in_it(tmp_path) -> None:
    """Ten million spaces are ten kilobytes, packed."""
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b" " * 10_000_000))
    assert max(map(len, text_files.blocks_of(path))) == text_files.BLOCK_BYTES
    assert sum(map(len, text_files.blocks_of(path))) == 10_000_000


def test_files_without_a_suffix_of_their_own_are_named_by_what_is_in_them() -> None:
    assert text_files.kind_of(Path("a/rows.JSONL.GZ")) == ".jsonl"
    assert text_files.kind_of(Path("a/rows.gz")) == ""
    assert text_files.kind_of(Path("a.b/rows.txt")) == ".txt"
