"""Code that comes with a model runs when the recipe says so and pins it, and not otherwise."""

import json
from pathlib import Path

import pytest

from qtune.errors import ModelError, RecipeError
from qtune.model import base
from qtune.recipe.load import load
from qtune.recipe.schema import Model

RECIPE = 'name = "t"\n[model]\nbase = "{base}"\n{model}\n[data]\ntrain = "rows.jsonl"\n[train]\nepochs = 1\n'
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TRUSTED = "trust_remote_code = true"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text("{}")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"model_type": "own"}')
    (tmp_path / "base" / "model.safetensors").touch()
    return tmp_path / "t.toml"


@pytest.mark.parametrize(
    "revision", ["", 'revision = "main"', f'revision = "{COMMIT[:39]}"', f'revision = "{COMMIT}0"']
)
def test_code_from_the_hub_needs_a_commit(recipe: Path, revision: str) -> None:
    recipe.write_text(RECIPE.format(base="owner/name", model=f"{TRUSTED}\n{revision}"))
    with pytest.raises(RecipeError, match=rf"t\.toml:4: {TRUSTED.replace('trust', 'model.trust')} .*40 of 0-9 and a-f"):
        load(recipe)


def test_an_override_cannot_go_round_that(recipe: Path) -> None:
    recipe.write_text(RECIPE.format(base="owner/name", model=""))
    with pytest.raises(RecipeError, match=r"--set model\.trust_remote_code=true: "):
        load(recipe, ["model.trust_remote_code=true"])


@pytest.mark.parametrize(
    ("name", "model"), [("owner/name", f'{TRUSTED}\nrevision = "{COMMIT}"'), ("./base", TRUSTED), ("owner/name", "")]
)
def test_a_commit_or_a_local_folder_will_do(recipe: Path, name: str, model: str) -> None:
    recipe.write_text(RECIPE.format(base=name, model=model))
    assert load(recipe).model.trust_remote_code == (TRUSTED in model)


def with_code(folder: Path, tiny_base: Path, auto_map: str) -> Path:
    """A copy of the base whose configuration names code; a folder is made where that runs."""
    folder.mkdir()
    for path in tiny_base.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": auto_map}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_evil.py").write_text(f"import os\nos.mkdir({str(folder / 'ran')!r})\n")
    return folder


def test_code_in_a_folder_does_not_run_unasked(tiny_base: Path, tmp_path: Path) -> None:
    folder = with_code(tmp_path / "evil", tiny_base, "configuration_evil.Config")
    with pytest.raises(ModelError, match=r"config\.json cannot be used"):
        base.read_config(Model(base=str(folder)))
    assert not (folder / "ran").exists()


def test_code_of_a_third_repository_is_refused_even_when_asked_for(tiny_base: Path, tmp_path: Path) -> None:
    """`revision` pins the base's repository, and not the one that its auto_map leads to."""
    folder = with_code(tmp_path / "evil", tiny_base, "other/repo--configuration_evil.Config")
    with pytest.raises(ModelError, match=r"takes code from another repository \('other/repo--configuration_evil"):
        base.read_config(Model(base=str(folder), trust_remote_code=True))
