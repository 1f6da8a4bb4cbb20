"""Rows that a finished run is asked about: read as the recipe reads its own where that fits."""

import json
from pathlib import Path

import pytest
from conftest import byte_tokenizer

from qtune.errors import DataError
from qtune.recipe.schema import Columns, Data
from qtune.rescore import OwnRows

MAPPED = Data(train="x", format="prompt-completion", columns=Columns(prompt="asked", completion="said"))


def read(folder: Path, *rows: object, data: Data = MAPPED) -> OwnRows:
    path = folder / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return OwnRows.read(path, data, byte_tokenizer(), lambda *told: None)


def test_the_recipes_columns_are_used_where_the_file_has_them(tmp_path: Path) -> None:
    mine = read(tmp_path, {"asked": "q", "said": "a", "question": "other", "answer": "other"})
    assert (mine.format, mine.examples[0].answer) == ("prompt-completion", "a")


def test_other_columns_are_recognised_by_themselves(tmp_path: Path) -> None:
    mine = read(tmp_path, {"question": "q", "answer": "b"}, {"question": "r", "answer": "c"})
    assert (mine.format, [row.answer for row in mine.examples]) == ("question-answer", ["b", "c"])
    assert mine.packs == ((0,), (1,))


def test_bad_rows_are_as_in_the_recipe_and_one_must_be_left(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"mine\.jsonl:2: is null"):
        read(tmp_path, {"question": "q", "answer": "b"}, None)
    lenient = MAPPED.model_copy(update={"on_bad_row": "drop"})
    left_out = read(tmp_path, {"asked": "q", "said": "b"}, None, data=lenient).dropped
    assert [row.place for tally in left_out for row in tally.first] == ["mine.jsonl:2"]
    with pytest.raises(DataError, match=r"no row can be used\. 1 of 1 rows: is null"):
        read(tmp_path, None, data=lenient)
