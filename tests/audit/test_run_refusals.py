"""The check of the data and a run agree on every file: what one refuses, the other does not call good."""

import dataclasses
import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
from conftest import byte_tokenizer

from qtune.audit.audit import audit
from qtune.audit.run_refusals import refusals
from qtune.audit.thresholds import Checked, judge
from qtune.data.prepare import prepare
from qtune.errors import DataError, ModelError
from qtune.evaluate.held_out import HeldOut, fault_asked, refuse_unscorable, scored_examples
from qtune.recipe.schema import Data, Evaluate, Model, Recipe, Train
from qtune.report.tables import data_warnings

TOKENIZER = byte_tokenizer()


def recipe_of(data: dict[str, Any], evaluate: dict[str, Any], seed: int = 0) -> Recipe:
    return Recipe(
        name="t",
        model=Model(base="demo"),
        data=Data(**data),
        evaluate=Evaluate(general="none", **evaluate),
        train=Train(seed=seed),
    )


def checked(recipe: Recipe) -> Checked:
    """As `qtune data check` has it."""
    found = audit(recipe.data, TOKENIZER, lambda *told: None, fault_asked(recipe.evaluate))
    return judge(found, recipe.data, refusals(found, recipe, TOKENIZER))


def run_says(recipe: Recipe) -> tuple[str, list[str]]:
    """Why `qtune check` and `qtune run` refuse, or else what they warn of."""
    try:
        prepared = prepare(recipe, TOKENIZER)
        held_out = HeldOut.of(prepared, recipe, TOKENIZER)
        refuse_unscorable(scored_examples(held_out, recipe.evaluate), recipe.evaluate)
    except (DataError, ModelError) as fault:
        return str(fault), []
    return "", data_warnings(dataclasses.asdict(prepared.report))


def good(number: int) -> dict[str, Any]:
    return {"question": f"what is {number}?", "answer": f"it is {number * 7}", "tests": f"assert f() == {number}"}


STRANGE = [
    {"question": "q", "answer": None},
    {"question": "q" * 90, "answer": "too long"},
    {"question": "q", "answer": "a", "tests": "assert ("},
    {"question": "q", "answer": "a"},
    {"messages": [{"role": "user", "content": "q"}]},
    ["no object"],
    good(1),
]
SETTINGS: dict[str, list[Any]] = {
    "on_bad_row": ["error", "drop"],
    "on_long": ["drop", "truncate", "error"],
    "held_out_fraction": [0.0, 0.05, 0.5],
    "max_tokens": [8, 60, 200],
}
LENIENT = {"max_dropped_fraction": 1.0, "max_long_fraction": 1.0, "max_duplicate_fraction": 1.0}
EVALUATE: list[dict[str, Any]] = [
    {},
    {"metric": "code_tests", "rows": 2},
    {"metric": "style"},
    {"metric": "none"},
    {"rows": 0},
    {"canaries": 2},
]


def made(folder: Path, dice: random.Random) -> Recipe:
    """A few rows, good and strange, with settings of every kind; a held-out file now and then."""
    data: dict[str, Any] = {name: dice.choice(values) for name, values in SETTINGS.items()}
    for name in ("train", "held_out"):
        if name == "held_out" and dice.random() < 0.7:
            continue
        kind = dice.choice(["jsonl", "jsonl", "jsonl", "txt", "csv"])
        path = folder / f"{name}.{kind}"
        data[name] = str(path)
        rows: list[Any] = [good(number) for number in range(dice.choice([0, 1, 2, 9]))]
        rows += [dice.choice(STRANGE) for _ in range(dice.choice([0, 0, 1, 2]))]
        match kind:
            case "jsonl":
                path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            case "txt":
                path.write_text("\n\n".join("A short text. " * dice.randint(1, 9) for _ in rows))
            case "csv":
                path.write_text("question,answer\n" + "".join(f"q{n},a\n" for n in range(len(rows))))
    if dice.random() < 0.5:
        data["check"] = LENIENT
    if dice.random() < 0.5:
        data["columns"] = {"check": "tests"}
    if "held_out" in data:
        del data["held_out_fraction"]
    return recipe_of(data, dice.choice(EVALUATE), seed=dice.randrange(5))


def test_neither_is_green_where_the_other_refuses(tmp_path: Path) -> None:
    """One row, and seven other shapes, were called good and refused a moment later, or trained on without a word."""
    dice, seen = random.Random(1), dict.fromkeys(itertools.product((True, False), ("fine", "warnings", "faults")), 0)
    for number in range(200):
        folder = tmp_path / str(number)
        folder.mkdir()
        recipe = made(folder, dice)
        found, (refused, warned) = checked(recipe), run_says(recipe)
        told = f"{recipe.data} {recipe.evaluate}: {refused or warned} {[each.sentence for each in found.findings]}"
        assert not refused or found.outcome == "faults", told
        assert refused or warned or found.outcome != "faults", told
        seen[bool(refused), found.outcome] += 1
    assert seen[True, "faults"] > 25
    assert seen[False, "fine"] > 10


@pytest.mark.parametrize(
    ("rows", "data", "evaluate", "code"),
    [
        ([good(1)], {}, {}, "nothing-left"),
        ([good(1), good(2)], {"held_out_fraction": 0.9}, {}, "nothing-left"),
        ([good(1)] * 3, {"max_tokens": 8, "check": LENIENT}, {}, "nothing-left"),
        ([{"question": "q", "answer": 1}] * 3, {"on_bad_row": "drop", "check": LENIENT}, {}, "nothing-left"),
        ([good(n) for n in range(9)], {}, {"metric": "code_tests"}, "not-scorable"),
        ([good(n) for n in range(9)], {"max_tokens": 60}, {"canaries": 1}, "canaries"),
    ],
)
def test_what_is_the_fault_of_no_row_is_a_fault(
    tmp_path: Path, rows: list[Any], data: dict[str, Any], evaluate: dict[str, Any], code: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = recipe_of({"train": str(path), **data}, evaluate)
    (finding,) = [each for each in checked(recipe).findings if each.level == "fault"]
    assert finding.code == code
    assert run_says(recipe)[0]


def test_only_rows_that_are_asked_must_be_scorable(tmp_path: Path) -> None:
    """Training rows need no tests, and rows behind the first `evaluate.rows` are never asked."""
    train, held_out = tmp_path / "train.jsonl", tmp_path / "held_out.jsonl"
    train.write_text("".join(json.dumps({"question": f"q{n}", "answer": "a"}) + "\n" for n in range(5)))
    held_out.write_text("".join(json.dumps(row) + "\n" for row in (good(1), {"question": "q", "answer": "a"})))
    data = {"train": str(train), "held_out": str(held_out), "columns": {"check": "tests"}}
    for rows, outcome in ((1, "fine"), (2, "faults")):
        recipe = recipe_of(data, {"metric": "code_tests", "rows": rows})
        assert checked(recipe).outcome == outcome
        assert bool(run_says(recipe)[0]) == (outcome == "faults")


def test_a_file_of_which_no_row_can_be_read_is_a_fault_and_not_empty(tmp_path: Path) -> None:
    """With a held-out file, and bad rows dropped, the check had nothing against training rows of which none is one."""
    (tmp_path / "train.jsonl").write_text("null\n3\n")
    (tmp_path / "held_out.jsonl").write_text(json.dumps(good(1)) + "\n")
    data = {"train": str(tmp_path / "train.jsonl"), "held_out": str(tmp_path / "held_out.jsonl")}
    recipe = recipe_of({**data, "on_bad_row": "drop", "check": LENIENT}, {})
    faults = [each for each in checked(recipe).findings if each.level == "fault"]
    assert [fault.code for fault in faults] == ["nothing-left"]
    assert "no row can be used. 1 of 2 rows" in run_says(recipe)[0]
