"""The plan: arithmetic a person can redo, and a reason for each choice."""

import json

import pytest

from qtune.memory.device import Device
from qtune.plan.decide import decide
from qtune.recipe.schema import Data, Model, Recipe, Train

CARD = Device("cuda:0", "RTX 3060", 12 * 1024**3, 11 * 1024**3, "bfloat16")
OLD_CARD = Device("cuda:0", "GTX 1080", 8 * 1024**3, 7 * 1024**3, "float16")
HOST = Device("cpu", "CPU, 2 cores", 24 * 1024**3, 20 * 1024**3, "float32")


def recipe(**train: object) -> Recipe:
    return Recipe(name="t", model=Model(base="demo"), data=Data(train="rows.jsonl"), train=Train(**train))


@pytest.mark.parametrize(
    ("train", "packs", "steps"),
    [
        ({"gradient_accumulation": 8, "epochs": 1.0}, 16, 2),
        ({"gradient_accumulation": 8, "epochs": 1.0}, 17, 3),  # a last step with what is left
        ({"gradient_accumulation": 8, "epochs": 0.5}, 32, 2),
        ({"gradient_accumulation": 2, "micro_batch": 4, "epochs": 3.0}, 9, 6),
        ({"gradient_accumulation": 1, "epochs": 2.0, "max_steps": 5}, 100, 5),
        ({"gradient_accumulation": 8, "epochs": 1.0}, 1, 1),
    ],
)
def test_steps(train: dict, packs: int, steps: int) -> None:
    assert decide(recipe(**train), CARD, packs).steps == steps


@pytest.mark.parametrize(("device", "dtype"), [(CARD, "bfloat16"), (OLD_CARD, "float16"), (HOST, "float32")])
def test_compute_is_what_the_device_has(device: Device, dtype: str) -> None:
    assert decide(recipe(), device, 10).compute_dtype == dtype


def test_what_the_recipe_says_is_kept() -> None:
    asked = Recipe(
        name="t",
        model=Model(base="demo", compute_dtype="float32"),
        data=Data(train="rows.jsonl"),
        train=Train(eval_every=7),
    )
    plan = decide(asked, CARD, 100)
    assert plan.compute_dtype == "float32"
    assert plan.eval_every == 7


def test_every_choice_has_a_reason_and_the_plan_is_json() -> None:
    plan = decide(recipe(), CARD, 1000)
    assert all(choice.value and choice.reason for choice in plan.choices)
    assert json.loads(json.dumps(plan.as_json()))["steps"] == plan.steps
    assert plan.eval_every * 10 >= plan.steps
