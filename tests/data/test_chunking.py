"""A text longer than a sequence comes in pieces that are the text again, and end where a reader would pause."""

import random
from collections.abc import Sequence

import pytest
from conftest import BOS, END, byte_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qtune.data.chunking import fitted
from qtune.data.file_readers import TEXT_CHARACTERS, read_file
from qtune.data.formats import Message
from qtune.data.prepare import prepare
from qtune.data.rows import Conversation, Cut, Document, Dropped, Example
from qtune.data.tokenize import Encoder, tokenize
from qtune.recipe.schema import Data, Model, Recipe

TOKENIZER = byte_tokenizer()


def pieces(
    text: str, max_tokens: int, continues: bool = False, tokenizer: PreTrainedTokenizerBase = TOKENIZER
) -> tuple[Sequence[Example], Example]:
    """The pieces, and the whole as it would be without a limit."""
    encoder, item = Encoder.of(tokenizer), Document(text, "a.txt:1", continues=continues)
    (whole,) = tokenize([item], None, encoder)
    assert isinstance(whole, Example)
    parts = fitted(item, whole, Data(train="/a.txt", max_tokens=max_tokens), encoder)
    return [part for part in parts if isinstance(part, Example)], whole


def texts(parts: Sequence[Example]) -> list[str]:
    return [TOKENIZER.decode(part.input_ids, skip_special_tokens=True) for part in parts]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one. two. more\n\nthree four", ["one. two. more\n\n", "three four"]),
        ("one. two. more\n \n\n  three", ["one. two. more\n \n\n", "  three"]),
        ("one.\ntwo. and three four f", ["one.\n", "two. and three four f"]),
        ("a b. (c d.) e f g hi j kl m", ["a b. (c d.)", " e f g hi j kl m"]),
        ("word after word and another", ["word after word and", " another"]),
        ("x" * 50, ["x" * 22, "x" * 22, "x" * 6]),
        ("ä" * 25 + "x", ["ä" * 11, "ä" * 11, "äääx"]),
    ],
)
def test_a_piece_ends_with_the_best_end_that_fits(text: str, expected: list[str]) -> None:
    """Twenty-four tokens: a BOS, 22 bytes, and room for the end of sequence."""
    assert texts(pieces(text, 24)[0]) == expected


@pytest.mark.parametrize("continues", [False, True])
@pytest.mark.parametrize("max_tokens", [8, 9, 33, 100, 1000])
def test_nothing_is_lost_and_only_a_real_end_has_an_end_token(max_tokens: int, continues: bool) -> None:
    """Random prose with every kind of end, and characters of one to four bytes. All of it was dropped as too long."""
    dice = random.Random(max_tokens)
    bits = ["word", " ", ". ", "\n", "\n\n", "\n \n", "é", "🧀", "。", "x" * 40, '." ', "  "]
    for _ in range(30):
        text = "".join(dice.choice(bits) for _ in range(60)) + "end"
        parts, whole = pieces(text, max_tokens, continues)
        assert all(len(part.input_ids) <= max_tokens and part.labels == part.input_ids for part in parts)
        joined = [token for part in parts for token in part.input_ids[1:]]
        assert [BOS, *joined] == whole.input_ids
        assert "".join(texts(parts)) == text
        assert [part.input_ids[-1] == END for part in parts] == [False] * (len(parts) - 1) + [not continues]


@pytest.mark.parametrize("name", ["Phi-3", "Llama-3", "Qwen2.5-0.5B", "Mistral-7B-v0.3"])
def test_the_pieces_of_real_tokenizers_are_the_text(material, name: str) -> None:
    folder = material / "tokenizers" / name
    if not folder.is_dir():
        pytest.skip(f"no {name}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "It was the best of times. It was\nthe worst 🧀 of times.\n\n  A new paragraph, naïve?\n" * 9
    parts, whole = pieces(text, 50, tokenizer=tokenizer)
    skipped = int(Encoder.of(tokenizer).bos_id is not None)
    assert [token for part in parts for token in part.input_ids[skipped:]] == whole.input_ids[skipped:]
    assert len(parts) > 5


def test_other_rows_are_cut_or_dropped_as_the_recipe_says() -> None:
    item = Conversation((Message("user", "q"), Message("assistant", "a" * 90)), "r:1")
    row = Example([5] * 99, [5] * 99, [5], "q", "a" * 90, "r:1")
    encoder = Encoder.of(TOKENIZER)
    (dropped,) = fitted(item, row, Data(train="/r", max_tokens=50), encoder)
    assert isinstance(dropped, Dropped)
    (cut,) = fitted(item, row, Data(train="/r", max_tokens=50, on_long="truncate"), encoder)
    assert isinstance(cut, Example)
    assert len(cut.input_ids) == 50


def test_a_text_in_several_documents_is_counted_once() -> None:
    cut = Cut()
    for continues, parts in ((True, 5), (True, 5), (False, 1), (False, 1), (False, 3)):
        cut.see(Document("t", "a.txt:1", continues=continues), parts)
    assert (cut.texts, cut.pieces) == (2, 14)


@pytest.mark.long
def test_a_large_text_is_read_in_rows_that_end_with_a_paragraph(tmp_path) -> None:
    """It is one text all the same: one end of sequence, at its end."""
    paragraph = "word " * 20_000 + "\n\n"
    content = paragraph * 25 + "the end"
    (tmp_path / "a.txt").write_text(content)
    rows = list(read_file(tmp_path / "a.txt"))
    assert [row.continues for row in rows] == [True] * (len(rows) - 1) + [False]
    assert len(rows) > 1
    assert all(
        row.values["text"].endswith("\n\n") and len(row.values["text"]) < 2 * TEXT_CHARACTERS for row in rows[:-1]
    )
    assert "".join(row.values["text"] for row in rows) == content
    data = Data(train=str(tmp_path / "a.txt"), held_out_fraction=0.1, max_tokens=2**16)
    prepared = prepare(Recipe(name="t", model=Model(base="demo"), data=data), TOKENIZER)
    ends = sum(example.input_ids.count(END) for part in (prepared.train, prepared.held_out) for example in part)
    report = prepared.report
    assert (ends, report.cut_texts, report.pieces) == (1, 1, report.train_rows + report.held_out_rows)
