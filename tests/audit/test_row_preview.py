"""One row as the model sees it, found by number and by place."""

from pathlib import Path

import pytest
from conftest import byte_tokenizer

from qtune.audit.row_preview import ShownRow, show_row
from qtune.errors import DataError
from qtune.recipe.schema import Data

ROWS = '{"question": "one?", "answer": "first"}\n\nnull\n{"question": "two?", "answer": ""}\n'


def show(folder: Path, wanted: str, is_held_out: bool = False, **settings: object) -> ShownRow:
    return show_row(Data(train=str(folder / "rows.jsonl"), **settings), wanted, is_held_out, byte_tokenizer())


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text(ROWS)
    return tmp_path


def test_what_is_trained_stands_apart_and_special_tokens_are_seen(rows: Path) -> None:
    row = show(rows, "1")
    assert [(stretch.text, stretch.is_trained) for stretch in row.stretches] == [
        ("<s><|user|>\none?<|end|>\n<|assistant|>\n", False),
        ("first<|end|>", True),
        ("\n", False),
    ]
    assert (row.place, row.number, row.format, row.not_used) == ("rows.jsonl:1", 1, "question-answer", None)
    assert (row.trained_tokens, row.cut_trained_tokens) == (6, 0)
    assert "<|end|>" in row.special_tokens


@pytest.mark.parametrize("wanted", ["2", "rows.jsonl:3"])
def test_numbers_count_rows_and_places_count_lines(rows: Path, wanted: str) -> None:
    row = show(rows, wanted)
    assert (row.number, row.place, row.stretches) == (2, "rows.jsonl:3", ())
    assert row.not_used == "is null, not an object with columns"


def test_a_row_its_format_cannot_use_says_why(rows: Path) -> None:
    assert show(rows, "3").not_used == "the answer is empty"


@pytest.mark.parametrize(("on_long", "not_used"), [("truncate", None), ("drop", "is longer than data.max_tokens = 14")])
def test_the_cut_is_marked_in_the_right_place(rows: Path, on_long: str, not_used: str | None) -> None:
    row = show(rows, "1", max_tokens=14, on_long=on_long)
    kept = "".join(stretch.text for stretch in row.stretches if not stretch.is_cut)
    cut = [(stretch.text, stretch.is_trained) for stretch in row.stretches if stretch.is_cut]
    assert len(byte_tokenizer()(kept, add_special_tokens=False)["input_ids"]) == 14
    assert kept + "".join(text for text, _ in cut) == "<s><|user|>\none?<|end|>\n<|assistant|>\nfirst<|end|>\n"
    assert row.not_used == not_used
    assert row.trained_tokens + row.cut_trained_tokens == 6


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ("4", "has 3 rows, so there is no row 4"),
        ("0", "no row 0"),
        ("rows.jsonl:2", "The row before it begins at rows.jsonl:1"),
        ("other.jsonl:1", "no row of rows.jsonl begins there"),
        ("x", "no row of rows.jsonl begins there"),
    ],
)
def test_a_row_that_is_not_there(rows: Path, wanted: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        show(rows, wanted)


def test_held_out_rows_have_a_file_of_their_own(rows: Path) -> None:
    (rows / "apart.jsonl").write_text('{"text": "apart"}\n')
    row = show(rows, "1", is_held_out=True, held_out=str(rows / "apart.jsonl"))
    assert (row.place, row.format) == ("apart.jsonl:1", "text")
    with pytest.raises(DataError, match="--held-out: this recipe names no"):
        show(rows, "1", is_held_out=True)
