"""R5: a run goes on only with the recipe it began with: each setting, changed alone, is named with both values."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fault_lab.workshop import Workshop, qtune
from qtune.errors import RecipeError
from qtune.recipe.load import load
from qtune.recipe.schema import Recipe

WHAT = "every setting of the recipe changed before resuming, one at a time"
VALUES: tuple[Any, ...] = (
    *(True, False, 20, 2, 3, 1, 0.25, 0.5, 0.01, "6GiB", "90s", "question", "x", "device", "host", "16bit", "nf4"),
    *("none", "float32", "bfloat16", "cosine", "linear", "adamw", "error", "truncate", "drop", "exact_match"),
    *("token_f1", "question-answer", ["q_proj"]),
)
DEMO = """
[demo.data]
train = "rows.jsonl"
[demo.train]
epochs = 1
[demo.evaluate]
metric = "exact_match"
"""


def run(cases: int, seed: int, folder: Path) -> Iterator[str | None]:
    """`cases` rounds over all settings."""
    for number in range(seed, seed + cases):
        (folder / str(number)).mkdir()
        shop = Workshop.open(folder / str(number), number)
        recipe = shop.recipe(train={"max_steps": 4, "epochs": 4})
        recipe.write_text(recipe.read_text() + DEMO)
        shop.undisturbed(recipe)
        shutil.copytree(shop.base, shop.folder / "base-copy")
        for name in ("rows-copy.jsonl", "held.jsonl"):
            shutil.copy(shop.folder / "rows.jsonl", shop.folder / name)
        (shop.folder / "template.jinja").write_text("{{ messages }}")
        before = dict(_leaves(load(recipe).model_dump(mode="json")))
        for field in before:
            yield _one(shop, recipe, field)


def _leaves(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{above}{name}.")
        else:
            yield above + name, value


def _one(shop: Workshop, recipe: Path, field: str) -> str | None:
    override = _override(shop, recipe, field)
    ended = qtune("resume", shop.folder / "undisturbed", "--set", override)
    said = " ".join(ended.text.split())
    if ended.code != 2 or "fault is ours" in said:
        return f"{override}: exit {ended.code}, {ended.last_line}"
    return None if field in said else f"{override}: it said {said}"


def _override(shop: Workshop, recipe: Path, field: str) -> str:
    """A --set that changes `field` alone, in a recipe that still loads, if there is one: some are for hub data only."""
    names = ["base-copy", "rows-copy.jsonl", "held.jsonl", "template.jinja"]
    files = [str(shop.folder / name) for name in names]
    before = load(recipe)
    for value in (*files, *VALUES):
        override = f"{field}={json.dumps(value)}"
        try:
            now = load(recipe, [override])
        except RecipeError:
            continue
        if _changed(before, now) == [field]:
            return override
    return f"{field}=main"


def _changed(before: Recipe, now: Recipe) -> list[str]:
    old, new = (dict(_leaves(recipe.model_dump(mode="json"))) for recipe in (before, now))
    return [field for field in dict.fromkeys([*old, *new]) if old.get(field) != new.get(field)]
