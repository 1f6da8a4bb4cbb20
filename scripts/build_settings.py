#!/usr/bin/env python3
"""Write docs/settings.md, every setting of a recipe with its default and its reason, from the schema itself."""

import json
from pathlib import Path
from typing import Any

from qtune.recipe.load import json_schema

PAGE = Path(__file__).resolve().parent.parent / "docs" / "settings.md"
HEAD = """# All settings

Each table below is a section of a [recipe](recipes.md), each line a setting. What has no default has to be given, or is
off. This page is written by `scripts/build_settings.py`.
"""


def page() -> str:
    """The whole page, in the order of the schema."""
    schema = json_schema()
    return HEAD + "".join(_sections(schema, schema, ""))


def _sections(schema: dict[str, Any], table: dict[str, Any], name: str, is_list: bool = False) -> list[str]:
    """`table`, or each of a list of them, as a section called `name`, then the tables in it."""
    tables = {key: found for key, value in table["properties"].items() if (found := _table(schema, value))}
    rows = [_row(key, value) for key, value in table["properties"].items() if key not in tables]
    header = f"[[{name}]]" if is_list else f"[{name}]"
    title = f"`{header}`" if name else "At the top of the file"
    head = f"\n## {title}\n\n| setting | default | what it does |\n|---|---|---|\n" if rows else ""
    inner = (
        part
        for key, found in tables.items()
        for part in _sections(schema, found, f"{name}.{key}".lstrip("."), "items" in table["properties"][key])
    )
    return [head, *rows, *inner]


def _table(schema: dict[str, Any], value: dict[str, Any]) -> dict[str, Any] | None:
    """What `value` refers to, where that is a table of settings."""
    places = (value, *value.get("anyOf", ()), value.get("items", {}))
    names = [each["$ref"].split("/")[-1] for each in places if "$ref" in each]
    return next((table for each in names if "properties" in (table := schema["$defs"][each])), None)


def _row(key: str, value: dict[str, Any]) -> str:
    default = "" if value.get("default") is None else f"`{json.dumps(value['default'])}`"
    choices = ", ".join(f"`{json.dumps(each)}`" for each in value.get("enum", ()))
    told = value.get("description", "") + (f" One of {choices}." if choices else "")
    return f"| `{key}` | {default} | {told.replace('|', chr(92) + '|')} |\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
