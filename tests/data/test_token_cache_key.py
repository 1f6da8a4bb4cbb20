"""A template that writes the date is never served yesterday's."""

from datetime import datetime

import pytest
from conftest import byte_tokenizer

from qtune.data.sources import Source
from qtune.data.token_cache_key import _dates_written, key_of
from qtune.recipe.schema import Data, Model, Recipe

LLAMA = '{%- if strftime_now is defined %}{%- set date = strftime_now("%d %b %Y") %}{%- else %}{%- endif %}'
NOW, LATER, TOMORROW = datetime(2026, 3, 4, 9, 30), datetime(2026, 3, 4, 23, 59), datetime(2026, 3, 5, 0, 1)


@pytest.mark.parametrize(
    ("template", "dates"),
    [
        ("{{ messages }}", []),
        (LLAMA, ["04 Mar 2026"]),
        ("{{ strftime_now('%Y') }}{{ strftime_now( '%m' ) }}", ["2026", "03"]),
        ("{{ strftime_now('%H:%M') }}", None),
        ("{{ strftime_now(form) }}", None),
        ("{% set now = strftime_now %}{{ now('%Y') }}", None),
    ],
)
def test_the_date_is_part_of_the_key_and_the_time_has_none(template, dates) -> None:
    assert _dates_written(template, NOW) == dates
    assert _dates_written(template, LATER) == dates


def test_tomorrow_is_another_day() -> None:
    assert _dates_written(LLAMA, NOW) != _dates_written(LLAMA, TOMORROW)


def recipe_for(train: str) -> Recipe:
    return Recipe(name="t", model=Model(base="demo"), data=Data(train=train))


def test_a_tokenizer_that_is_a_program_has_no_key(tmp_path) -> None:
    class Own(type(byte_tokenizer())):
        pass

    (tmp_path / "a.jsonl").write_text("{}")
    recipe, source = recipe_for(str(tmp_path / "a.jsonl")), Source.open(str(tmp_path / "a.jsonl"))
    tokenizer = byte_tokenizer()
    assert key_of(recipe, [source], tokenizer) is not None
    tokenizer.__class__ = Own
    assert key_of(recipe, [source], tokenizer) is None


def test_what_cannot_be_told_apart_has_no_key(tmp_path) -> None:
    recipe = recipe_for("someone/rows")
    for dataset in ([{"x": "1"}], None):
        assert key_of(recipe, [Source("/nowhere/rows.jsonl", dataset)], byte_tokenizer()) is None
