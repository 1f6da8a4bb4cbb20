"""The recipes that ship inside qtune: listed, found by name, copied with their sample data."""

import os
import shlex
import tomllib
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from qtune.errors import RecipeError
from qtune.recipe import conflicts, paths

SCHEMA = "qtune.schema.json"  # beside the recipes, whose first line names it to editors
PACKAGE = Path(__file__).resolve().parent.parent


def folder() -> Path:
    """`qtune/recipes` of an installed wheel, else `recipes` of a checkout."""
    inside = PACKAGE / "recipes"
    return inside if inside.is_dir() else PACKAGE.parent / "recipes"


def shipped() -> tuple[Path, ...]:
    """Every shipped recipe's file, by name."""
    return tuple(sorted(folder().glob("*.toml")))


def find(name: str) -> Path:
    """The recipe file `name`, else the shipped recipe of that name. Raises RecipeError with the nearest ones."""
    path, by_name = Path(name), _by_name()
    if os.path.isfile(path) or (os.path.exists(path) and name not in by_name):
        return path
    if name in by_name:
        return by_name[name]
    beside = [str(file) for file in path.parent.glob("*.toml")] if os.path.isdir(path.parent) else []
    raise _unknown(name, [*beside, *by_name])


def named(name: str) -> Path:
    """The shipped recipe `name`. Raises RecipeError with the nearest one."""
    by_name = _by_name()
    if name not in by_name:
        raise _unknown(name, list(by_name))
    return by_name[name]


def rows() -> list[dict[str, str]]:
    """Name, purpose, base and data of every shipped recipe, as they are written."""
    recipes = {path.stem: _values(path) for path in shipped()}
    return [
        {"name": name, "about": values["about"], "base": values["model"]["base"], "data": values["data"]["train"]}
        for name, values in recipes.items()
    ]


def copy(name: str, target: Path) -> Path:
    """Write the shipped recipe `name` to `target`, and the files it names beside it under the same relative names: its
    rows, and the schema that editors complete and check it with, in place of one of another version.

    A target that ends in .toml is the file, any other the folder for it. Returns the file. Raises RecipeError for an
    unknown name, and, before anything is written, where a file of other content is in the way.
    """
    source = named(name)
    target = target if target.suffix == ".toml" else target / source.name
    names = [*_files_named(source), SCHEMA]
    files = {target: source} | {target.parent / name: source.parent / name for name in names}
    try:
        contents = {copied: original.read_bytes() for copied, original in files.items()}
        contents[target] = _called(contents[target], source, target)
        in_the_way = [path for path, content in contents.items() if path.exists() and not _holds(path, content)]
        if in_the_way:
            raise RecipeError([f"{path}: exists already, and is not overwritten." for path in in_the_way])
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    except OSError as fault:
        raise RecipeError([f"{fault.filename}: cannot be written ({fault.strerror}). Name another place."]) from None
    return target


def _called(text: bytes, source: Path, target: Path) -> bytes:
    """A recipe whose comments give commands for the file that it is copied to, in its own folder."""
    return text.replace(f"recipes/{source.name}".encode(), shlex.quote(target.name).encode())


def _by_name() -> dict[str, Path]:
    return {path.stem: path for path in shipped()}


def _unknown(name: str, known: list[str]) -> RecipeError:
    near = get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return RecipeError([f"{name}: there is no such recipe.{hint} Shipped recipes: {', '.join(_by_name())}."])


def _values(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))


def _files_named(recipe: Path) -> list[str]:
    """The files beside a recipe that its settings name, as they are written; a file named twice is there once."""
    values = _values(recipe)
    named = (conflicts.value_of(values, key) for key in (*paths.TEMPLATES, *paths.DATA))
    return list(dict.fromkeys(name for name in named if name and (recipe.parent / name).is_file()))


def _holds(path: Path, content: bytes) -> bool:
    """Whether `path` is this content, or a schema of ours, which follows the version of qtune."""
    if not path.is_file():
        return False
    there = path.read_bytes()
    return there == content or (path.name == SCHEMA and b'"title": "qtune recipe"' in there)
