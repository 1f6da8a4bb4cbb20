"""What was forgotten is measured on text of the user's choice, in packs that a run can hold."""

from pathlib import Path

import pytest

from qtune.errors import DataError
from qtune.evaluate.held_out import MOST_TOKENS, general_packs
from qtune.model.tokenizer import load_tokenizer
from qtune.recipe.schema import Model

TOKENIZER = load_tokenizer(Model(base="demo"))


@pytest.mark.parametrize("max_tokens", [64, 512])
def test_the_builtin_text_fills_packs_and_ends_in_time(max_tokens: int) -> None:
    packs = general_packs("builtin", TOKENIZER, max_tokens)
    assert packs is not None
    lengths = [len(pack["input_ids"]) for pack in packs]
    assert max(lengths) <= max_tokens
    assert 0.9 * MOST_TOKENS < sum(lengths) <= MOST_TOKENS


def test_a_file_of_ones_own_is_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "prose.txt"
    path.write_text("first line\n\n" + "long " * 300 + "\n", encoding="utf-8")
    packs = general_packs(str(path), TOKENIZER, 64)
    assert packs is not None
    first, long = packs.examples[0], packs.examples[1]
    assert (first.place, long.place) == ("prose.txt:1", "prose.txt:3")
    assert TOKENIZER.decode(first.input_ids, skip_special_tokens=True) == "first line"
    assert len(long.input_ids) == 64


def test_none_measures_nothing() -> None:
    assert general_packs("none", TOKENIZER, 64) is None


@pytest.mark.parametrize(("content", "said"), [(b"\n \n", "holds no text"), (b"\xff\xfe\x00", "cannot be read")])
def test_a_file_without_text_is_refused_by_name(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=said) as refused:
        general_packs(str(path), TOKENIZER, 64)
    assert str(path) in str(refused.value)
