"""The schema keeps its promises: a sentence for every field, strict types, values that never change."""

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from qtune.recipe import schema
from qtune.recipe.schema import Data, DemoData, Evaluate, Lora, Recipe, Table, Train

TABLES = [table for table in vars(schema).values() if isinstance(table, type) and issubclass(table, Table)]


def fields() -> Iterator[tuple[str, FieldInfo]]:
    for table in TABLES:
        for name, field in table.model_fields.items():
            yield f"{table.__name__}.{name}", field


@pytest.mark.parametrize(("name", "field"), fields(), ids=lambda value: value if isinstance(value, str) else "")
def test_every_field_has_a_sentence_and_every_required_one_an_example(name: str, field: FieldInfo) -> None:
    assert field.description, name
    assert field.description.endswith("."), name
    is_table = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    assert field.examples or is_table or not field.is_required(), name


def test_every_table_has_a_docstring() -> None:
    assert len(TABLES) > 10
    assert all(table.__doc__ for table in TABLES)


def test_the_demo_data_are_a_part_of_the_data() -> None:
    """--demo copies these fields over [data] by name."""
    assert set(DemoData.model_fields) < set(Data.model_fields)


@pytest.mark.parametrize(
    ("table", "values"),
    [
        (Lora, {"rank": True}),
        (Lora, {"rank": 3.0}),
        (Lora, {"rank": "3"}),
        (Lora, {"alpha": True}),
        (Lora, {"alpha": float("nan")}),
        (Lora, {"dora": 1}),
        (Lora, {"targets": []}),
        (Lora, {"targets": [3]}),
        (Lora, {"targets": ["q_proj", " "]}),
        (Lora, {"targets": "q_proj"}),
        (Train, {"max_grad_norm": float("inf")}),
        (Train, {"max_steps": 2**31}),
        (Train, {"patience": 0}),
        (Evaluate, {"watch": True}),
        (Evaluate, {"watch": -1}),
        (Evaluate, {"watch": 21}),
        (Evaluate, {"watch": []}),
        (Evaluate, {"watch": ["a", " "]}),
        (Evaluate, {"watch": "Who are you?"}),
        (Data, {"train": " "}),
        (Data, {"train": "x.jsonl", "system": ""}),
    ],
)
def test_values_of_a_wrong_type_or_range_are_refused(table: type[Table], values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        table.model_validate(values)


def test_what_toml_gives_is_accepted() -> None:
    lora = Lora.model_validate({"alpha": 16, "targets": ["q_proj", "v_proj"]})
    assert (lora.alpha, lora.targets) == (16.0, ("q_proj", "v_proj"))
    assert Lora.model_validate({"targets": "all-linear"}).targets == "all-linear"


def test_a_recipe_never_changes() -> None:
    with pytest.raises(ValidationError):
        Lora().rank = 3


def test_a_recipe_survives_its_own_dump() -> None:
    recipe = Recipe.model_validate({"name": "x", "model": {"base": "b/c"}, "data": {"train": "d/e"}})
    assert Recipe.model_validate(recipe.model_dump()) == recipe
