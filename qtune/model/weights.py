"""What a base's folder may hold: weights in safetensors under their usual names, and no way out of the folder.

A folder comes from anybody. Pickles run code when they are opened, an index may name files elsewhere, an
adapter_config.json has transformers load another base, and `auto_map` may fetch code from another repository.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qtune.errors import ModelError

INDEX_NAME, SINGLE_NAME, ADAPTER_CONFIG = "model.safetensors.index.json", "model.safetensors", "adapter_config.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
CONFIGS = ("config.json", "tokenizer_config.json")


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights. Raises ModelError where they are missing, outside, or something else."""
    if (folder / ADAPTER_CONFIG).is_file():
        raise ModelError(
            f"model.base: {folder} is an adapter, it has an {ADAPTER_CONFIG}. Name the model it was trained on, or"
            " merge the two."
        )
    if (folder / SINGLE_NAME).is_file():
        return [folder / SINGLE_NAME]
    if not (folder / INDEX_NAME).is_file():
        raise ModelError(f"model.base: {folder} has neither {SINGLE_NAME} nor {INDEX_NAME}.{_instead(folder)}")
    index = read_index(folder / INDEX_NAME)
    return [folder / name for name in sorted(set(index["weight_map"].values()))]


def read_index(path: Path) -> dict[str, Any]:
    """A shard index, whose `weight_map` names safetensors files beside it; raises ModelError for any other."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        names = set(index["weight_map"].values())
        if not all(isinstance(name, str) for name in names) or not isinstance(index.get("metadata", {}), dict):
            raise TypeError
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise ModelError(f"{path}: is no shard index, it has no weight_map from tensors to files.") from None
    if outside := sorted(name for name in names if Path(name).name != name or "\0" in name):
        raise ModelError(f"{path}: names files outside its folder ({', '.join(map(ascii, outside))}).")
    if other := sorted(name for name in names if not name.endswith(".safetensors")):
        raise ModelError(f"{path}: names files that are not .safetensors ({', '.join(map(ascii, other))}).")
    return index


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


def _instead(folder: Path) -> str:
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if not pickles:
        return " Download the base again."
    return (
        f" {pickles[0]} is a pickle, which can run code when it is opened, and is not read. Convert it where you trust"
        " it: load the model with transformers and `save_pretrained` it, which writes safetensors."
    )
