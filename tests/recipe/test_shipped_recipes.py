"""The shipped recipes are listed, found and copied so that they run where they land."""

import json
import tomllib
from pathlib import Path

import pytest

from qtune.errors import RecipeError
from qtune.recipe import shipped_recipes
from qtune.recipe.load import json_schema, load

NAMES = ["code", "medical", "style", "support", "tools"]


def test_the_shipped_recipes_are_listed() -> None:
    assert [path.stem for path in shipped_recipes.shipped()] == NAMES
    rows = shipped_recipes.rows()
    assert [row["name"] for row in rows] == NAMES
    assert all(row["about"] and row["base"] and row["data"] for row in rows)
    assert rows[1]["base"] == "Qwen/Qwen3-4B-Instruct-2507"


@pytest.mark.parametrize("name", NAMES)
def test_each_says_what_its_settings_cost(name: str) -> None:
    text = shipped_recipes.find(name).read_text(encoding="utf-8")
    assert text.startswith("#:schema ./qtune.schema.json\n# ")
    assert text.count("#") > 12
    assert "demo" in tomllib.loads(text)


def test_a_file_wins_over_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shipped_recipes.find("medical") == shipped_recipes.folder() / "medical.toml"
    (tmp_path / "style").mkdir()  # such as a folder of runs: not what is meant
    assert shipped_recipes.find("style") == shipped_recipes.folder() / "style.toml"
    (tmp_path / "medical").write_text("")
    assert shipped_recipes.find("medical") == Path("medical")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("medicla", "medical"),
        ("support.tml", "support"),
        ("mine.tml", "mine.toml"),
        ("x" * 300, None),
        ("a\0b", None),
        ("", None),
        ("nowhere/x.toml", None),
    ],
)
def test_an_unknown_name_gets_the_nearest(
    name: str, near: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text("")
    with pytest.raises(RecipeError) as found:
        load(shipped_recipes.find(name))
    if near:
        assert f"Did you mean {near}?" in str(found.value)
    if name not in ("", "a\0b"):
        assert "Shipped recipes: code, medical, style, support, tools." in str(found.value)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("target", ["mine.toml", "new/folder/mine.toml", "new/folder"])
def test_a_copy_runs_as_it_is(name: str, target: str, tmp_path: Path) -> None:
    copied = shipped_recipes.copy(name, tmp_path / target)
    assert copied == (tmp_path / target if target.endswith(".toml") else tmp_path / target / f"{name}.toml")
    text = shipped_recipes.find(name).read_text(encoding="utf-8")
    assert copied.read_text(encoding="utf-8") == text.replace(f"recipes/{name}.toml", copied.name)
    assert f"qtune run {copied.name} " in copied.read_text(encoding="utf-8")  # it named the file that it came from
    for demo in (False, True):
        load(copied, demo=demo)
    assert load(copied, demo=True).data.train == str(copied.parent / "data" / f"{name}_train.jsonl")


def test_copying_again_changes_nothing_and_other_content_is_left_alone(tmp_path: Path) -> None:
    target = shipped_recipes.copy("style", tmp_path / "mine.toml")
    assert shipped_recipes.copy("style", target) == target
    rows = tmp_path / "data" / "style_train.jsonl"
    rows.write_text("precious")
    target.write_text("mine")
    with pytest.raises(RecipeError) as found:
        shipped_recipes.copy("style", target)
    assert [fault.partition(":")[0] for fault in found.value.faults] == [str(target), str(rows)]
    assert (rows.read_text(), target.read_text()) == ("precious", "mine")
    (tmp_path / "data" / "support_train.jsonl").mkdir()
    with pytest.raises(RecipeError, match=r"support_train\.jsonl: exists already"):
        shipped_recipes.copy("support", tmp_path / "support.toml")
    assert not (tmp_path / "support.toml").exists()


def test_the_schema_beside_the_recipes_is_that_of_this_version(tmp_path: Path) -> None:
    """Written by `qtune schema > recipes/qtune.schema.json`; a copy takes it along, over one of another version."""
    shipped = shipped_recipes.folder() / shipped_recipes.SCHEMA
    assert json.loads(shipped.read_text(encoding="utf-8")) == json_schema()
    beside = tmp_path / shipped_recipes.SCHEMA
    beside.write_text('{"title": "qtune recipe", "properties": {}}')
    shipped_recipes.copy("style", tmp_path / "mine.toml")
    assert beside.read_bytes() == shipped.read_bytes()
    beside.write_text('{"title": "mine"}')
    with pytest.raises(RecipeError, match=r"qtune\.schema\.json: exists already"):
        shipped_recipes.copy("style", tmp_path / "mine.toml")


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for target in ("file/mine.toml", f"{'x' * 300}.toml"):
        with pytest.raises(RecipeError, match="cannot be written"):
            shipped_recipes.copy("code", tmp_path / target)


def test_only_shipped_recipes_are_copied(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"Did you mean code\?"):
        shipped_recipes.copy("cod", tmp_path / "x.toml")
