"""One stream of rows, in the order of their file: what is bad, with its kind; what is cut; what is left out."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import byte_tokenizer

from qtune.data.chat_template import ChatTemplate
from qtune.data.formats import FORMATS, RowFault
from qtune.data.row_stream import Encoding, UnknownColumns, format_of, parsed_rows
from qtune.data.rows import Conversation, Document, Dropped, EncodedRow
from qtune.data.sources import Source
from qtune.data.tokenize import Encoder
from qtune.recipe.schema import Data

TOKENIZER = byte_tokenizer()
GOOD = {"question": "q", "answer": "a"}


def source_of(folder: Path, *rows: object) -> Source:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(str(path))


def looked_at(rows: Sequence[Conversation | Document]) -> list[str]:
    return [row.place for row in rows]


def test_rows_come_in_order_and_only_those_with_tokens_are_looked_at(tmp_path: Path) -> None:
    long = {"question": "q", "answer": "a" * 99}
    source = source_of(tmp_path, GOOD, None, {"question": "q", "answer": " "}, long, GOOD)
    data = Data(train=source.name, max_tokens=60)
    encoding = Encoding(Encoder.of(TOKENIZER), ChatTemplate.of(TOKENIZER), looked_at)
    (batch,) = encoding.batches(parsed_rows(source, FORMATS["question-answer"], data), data)
    faults = [row.fault if isinstance(row, Dropped) else None for row in batch.rows]
    assert faults == [None, RowFault.UNREADABLE, RowFault.MISSING_ANSWER, None, None]
    assert batch.looked == ["rows.jsonl:1", "rows.jsonl:4", "rows.jsonl:5"]
    taken = [row.parts for row in batch.rows if isinstance(row, EncodedRow)]
    assert [len(parts) for parts in taken] == [1, 1, 1]
    assert [part.fault for (part,) in taken if isinstance(part, Dropped)] == [RowFault.TOO_LONG]


def test_a_format_is_told_by_the_first_row_and_else_by_every_column(tmp_path: Path) -> None:
    data = Data(train="x")
    assert format_of(source_of(tmp_path, None, GOOD, {"text": "t"}), data) is FORMATS["question-answer"]
    assert format_of(source_of(tmp_path, {"id": 1}, {"text": "t"}), data) is FORMATS["text"]
    assert format_of(source_of(tmp_path, None, 3), data) is None


def test_columns_that_no_format_fits_are_told_with_the_first_row_that_has_them(tmp_path: Path) -> None:
    with pytest.raises(UnknownColumns, match=r"rows\.jsonl: no format fits the columns id, x") as unknown:
        format_of(source_of(tmp_path, None, {"id": 1}, {"x": 2}), Data(train="x"))
    assert unknown.value.place == "rows.jsonl:2"
