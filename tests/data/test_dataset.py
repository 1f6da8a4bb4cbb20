"""Rows in flat arrays are the rows that were put in, in memory and on disk."""

import random
import re
import shutil
from pathlib import Path

import numpy
import pytest

from qtune.data import dataset as room
from qtune.data.dataset import Examples, ExampleWriter
from qtune.data.packing import packed_rows, seq_lengths
from qtune.data.rows import NOT_TRAINED, Example
from qtune.errors import DiskFull


def made_rows(count: int) -> list[Example]:
    """Rows of every shape: trained from the first token or not at all, cut before their prompt ends, without a text."""
    rng, rows = random.Random(0), []
    for number in range(count):
        ids = [rng.randrange(200_000) for _ in range(rng.randint(1, 30))]
        trained = [rng.random() < rng.choice([0, 0.2, 0.8, 1]) for _ in ids]
        labels = [token if mark else NOT_TRAINED for token, mark in zip(ids, trained, strict=True)]
        prompt = rng.choice([[], ids[: len(ids) // 2], [*ids, 7, 8]])
        text = rng.choice(["", "naïve ☃ 𝄞", "a\nb\0"])
        rows.append(Example(ids, labels, prompt, text, text * 2, f"r.jsonl:{number:,}", text[::-1], rng.choice([0, 5])))
    return rows


def written(rows: list[Example], folder: Path | None) -> Examples:
    writer = ExampleWriter(folder)
    for row in rows:
        writer.add(row)
    return writer.finish()


@pytest.fixture(params=["memory", "disk", "full disk"])
def folder(request, tmp_path, monkeypatch) -> Path | None:
    monkeypatch.setattr(room, "BLOCK_TOKENS", 200)
    if request.param == "full disk":
        return tmp_path / "gone"
    return tmp_path if request.param == "disk" else None


def test_rows_come_back_as_they_were(folder) -> None:
    rows = made_rows(300)
    found = written(rows, folder)
    assert len(found.blocks) > 5
    assert list(found) == rows
    assert found == rows
    assert found != rows[1:]
    assert found[-1] == rows[-1]
    assert found[5:9] == rows[5:9]
    assert found.take([7, 3])[::-1] == [rows[3], rows[7]]
    assert found.tokens.tolist() == [len(row.input_ids) for row in rows]
    assert found.trained_tokens.tolist() == [row.trained_tokens for row in rows]
    assert found.cut_tokens.tolist() == [row.cut_tokens for row in rows]


def test_blocks_outlive_their_files(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(room, "BLOCK_TOKENS", 200)
    rows = made_rows(100)
    found = written(rows, tmp_path)
    shutil.rmtree(tmp_path)
    assert found == rows


def test_packed_rows_are_the_documents_joined(folder) -> None:
    rows = made_rows(100)
    packs = [(0, 4, 9), (99,), (50, 51)]
    made = packed_rows(written(rows, folder), packs)
    assert len(made) == len(made[:]) == 3
    for row, members in zip(made, packs, strict=True):
        assert row["input_ids"].tolist() == [token for i in members for token in rows[i].input_ids]
        assert row["labels"].tolist() == [label for i in members for label in rows[i].labels]
        assert row["seq_lengths"] == [len(rows[i].input_ids) for i in members]
    assert seq_lengths(made) == seq_lengths(list(made))


def test_rows_that_were_read_are_not_held(tmp_path, monkeypatch) -> None:
    """Pages of a mapped file count as memory of the process until they are given back."""
    monkeypatch.setattr(room, "BLOCK_TOKENS", 1 << 20)
    ids = list(range(50_000))
    found = written([Example(ids, ids, [], "", "", "")] * 300, tmp_path)  # 60 MB
    before, most = mapped_bytes(), 0
    for row in range(len(found)):
        found.arrays(row)[0].sum()
        if row % 50 == 49:
            found.blocks.give_back()
            most = max(most, mapped_bytes() - before)
    assert most < 5e6
    assert sum(int(row.sum()) for row, _ in found.each()) == 300 * sum(ids)
    assert mapped_bytes() - before > 50e6  # else nothing is shown here


def test_pages_are_given_back_as_rows_go_by(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(room, "ROWS_BETWEEN", 10)
    asked = []
    monkeypatch.setattr(room.Blocks, "give_back", lambda self: asked.append(self))
    assert len(list(written(made_rows(35), tmp_path).each())) == 35
    assert len(asked) == 3


def mapped_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssFile:\s+(\d+) kB", status)[1])


def test_more_than_memory_should_hold_is_refused_where_the_disk_takes_no_more(tmp_path, monkeypatch) -> None:
    """A file of 10 GB on a full disk would otherwise fill the memory."""
    monkeypatch.setattr(room, "BLOCK_TOKENS", 200)
    monkeypatch.setattr(room, "MOST_UNWRITTEN_BYTES", 50_000)
    with pytest.raises(
        DiskFull, match=r"takes no more of the tokenised rows, and memory holds .* QTUNE_CACHE may name"
    ):
        written(made_rows(3000), tmp_path / "gone")


def test_what_was_written_before_the_disk_was_full_is_read_from_there(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(room, "BLOCK_TOKENS", 200)
    rows, write, calls = made_rows(300), room.append, []

    def until_full(block: room.Block, file) -> dict[str, int]:
        calls.append(block)
        if len(calls) > 4:
            file.write(b"half")
            raise OSError("no space")
        return write(block, file)

    monkeypatch.setattr(room, "append", until_full)
    writer = ExampleWriter(tmp_path)
    for row in rows:
        writer.add(row)
    assert writer.finish() == rows
    assert len(calls) == 5
    assert writer.folder is None


def test_no_rows(folder) -> None:
    found = written([], folder)
    assert found == ()
    assert found.tokens.sum() == 0
    assert found.digests.tolist() == []


def test_a_token_takes_four_bytes_and_its_label_next_to_none() -> None:
    ids = list(range(10_000))
    labels = [NOT_TRAINED] * 4_000 + ids[4_000:]
    (block,) = written([Example(ids, labels, [], "", "", "")], None).blocks
    assert sum(array.nbytes for array in vars(block).values()) < 4 * len(ids) + 200
    assert block.ids.dtype == numpy.int32
