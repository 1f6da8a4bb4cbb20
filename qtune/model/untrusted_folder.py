"""No way out of a base's folder, which comes from anybody: `auto_map` may fetch code from another repository, and what
is copied from it may be a link. `recipe.base_kind` says which files may be weights.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qtune.errors import ModelError

CONFIGS = ("config.json", "tokenizer_config.json")


def refuse_code_elsewhere(folder: Path) -> None:
    """Raises ModelError where a configuration takes its code from another repository, whose revision nobody pinned."""
    for name in CONFIGS:
        try:
            described = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        auto_map = described.get("auto_map") if isinstance(described, dict) else None
        elsewhere = next((code for code in _texts(auto_map) if "--" in code), None)
        if elsewhere is not None:
            raise ModelError(
                f"model.base: {folder / name} takes code from another repository ({elsewhere!a}), which"
                " model.revision does not pin. Download that file into the folder, read it, and name it in auto_map."
            )


def _texts(value: Any) -> Iterator[str]:
    """Every text in a JSON value, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _texts(each)


def refuse_link_outside(path: Path) -> None:
    """Raises ModelError for a link out of its folder: what is copied from a base must have come with it.

    The hub's cache keeps files in `blobs`, beside `snapshots`, and links to them.
    """
    folder, target = path.parent.resolve(), path.resolve()
    homes = [folder, *([folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else [])]
    if not any(target.is_relative_to(home) for home in homes):
        raise ModelError(
            f"{path}: is a link to {target}, outside its folder, and would be copied into the merged model. Put a copy"
            " in its place, or remove it."
        )
