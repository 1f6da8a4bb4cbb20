"""Which rows are held out: as many as asked for, the same ones for a seed, and never all of them."""

import pytest

from qtune.data.held_out_split import held_out_of
from qtune.errors import DataError
from qtune.recipe.schema import Data


def data(fraction: float) -> Data:
    return Data(train="rows.jsonl", held_out_fraction=fraction)


def test_as_many_as_asked_for_in_order_and_the_same_ones_for_a_seed() -> None:
    apart = held_out_of(200, False, data(0.1), 7)
    assert len(apart) == 20
    assert apart == sorted(set(apart))
    assert set(apart) <= set(range(200))
    assert apart == held_out_of(200, False, data(0.1), 7)
    assert apart != held_out_of(200, False, data(0.1), 8)


def test_a_share_is_one_row_at_the_least_and_none_where_none_is_wanted() -> None:
    assert len(held_out_of(3, False, data(0.01), 0)) == 1
    assert held_out_of(3, False, data(0.0), 0) == []


@pytest.mark.parametrize(
    ("is_text", "words"), [(False, "usable rows are 1. Lower it, add rows"), (True, "the text makes 1 piece of up to")]
)
def test_one_row_cannot_be_parted(is_text: bool, words: str) -> None:
    with pytest.raises(DataError, match=words):
        held_out_of(1, is_text, data(0.05), 0)
