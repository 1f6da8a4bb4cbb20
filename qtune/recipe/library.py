"""The recipes that ship inside qtune: listed, found by name, copied with their sample data."""

import tomllib
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from qtune.errors import RecipeError, RunFolderError

PACKAGE = Path(__file__).resolve().parent.parent


def folder() -> Path:
    """`qtune/recipes` of an installed wheel, else `recipes` of a checkout."""
    inside = PACKAGE / "recipes"
    return inside if inside.is_dir() else PACKAGE.parent / "recipes"


def shipped() -> tuple[Path, ...]:
    return tuple(sorted(folder().glob("*.toml")))


def find(name: str) -> Path:
    """The recipe file `name`, or the shipped recipe of that name. Raises RecipeError naming the nearest."""
    path = Path(name)
    if path.exists():
        return path
    by_name = {recipe.stem: recipe for recipe in shipped()}
    if name in by_name:
        return by_name[name]
    beside = [str(found) for found in path.parent.glob("*.toml")]
    near = get_close_matches(name, [*beside, *by_name], n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise RecipeError([f"{name}: there is no such recipe.{hint} Shipped recipes: {', '.join(by_name)}."])


def rows() -> list[dict[str, str]]:
    """Name, purpose, base and data of every shipped recipe."""
    return [
        {"name": path.stem, "about": raw["about"], "base": raw["model"]["base"], "data": raw["data"]["train"]}
        for path, raw in ((path, tomllib.loads(path.read_text(encoding="utf-8"))) for path in shipped())
    ]


def copy(name: str, target: Path) -> Path:
    """Write a shipped recipe to `target`, and the files it names beside it under the same relative names.

    Nothing is overwritten: raises RunFolderError where a file of other content is in the way.
    """
    source = find(name)
    target = target / source.name if target.is_dir() else target
    wanted = {target: source.read_bytes()}
    for relative in _files_named(tomllib.loads(source.read_text(encoding="utf-8"))):
        if (source.parent / relative).is_file():
            wanted[target.parent / relative] = (source.parent / relative).read_bytes()
    in_the_way = [str(path) for path, content in wanted.items() if path.exists() and path.read_bytes() != content]
    if in_the_way:
        raise RunFolderError(f"{', '.join(in_the_way)}: exists already, and is not overwritten. Name another file.")
    for path, content in wanted.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return target


def _files_named(raw: dict[str, Any]) -> Iterator[str]:
    """Every relative file name in a recipe's data, its demo's data and its template."""
    demo = raw.get("demo", {}).get("data", {})
    for table in (raw["data"], demo):
        yield from (table[key] for key in ("train", "held_out") if key in table)
    if "chat_template" in raw["model"]:
        yield raw["model"]["chat_template"]
