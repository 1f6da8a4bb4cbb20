"""Which settings of a recipe name something on this machine, and whether it is there."""

import os
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from qtune.recipe.chat_templates import BUILT_IN
from qtune.recipe.data_files import DATA_SUFFIXES, SAVED, SAVED_SPLITS, files_of, is_pattern
from qtune.recipe.error_messages import Fault, dotted, shown
from qtune.recipe.toml_reader import Key

MODELS: tuple[Key, ...] = (("model", "base"), ("demo", "model", "base"))
TEMPLATES: tuple[Key, ...] = (("model", "chat_template"), ("demo", "model", "chat_template"))
DATA: tuple[Key, ...] = (
    ("data", "train"),
    ("data", "held_out"),
    ("demo", "data", "train"),
    ("demo", "data", "held_out"),
)
START: Key = ("lora", "start_from")  # an adapter, found as a base is
SOURCES: Key = ("data", "sources")
GENERAL: Key = ("evaluate", "general")
GENERAL_WORDS = ("builtin", "none")
WORDS = {GENERAL: GENERAL_WORDS, **dict.fromkeys(TEMPLATES, tuple(BUILT_IN))}  # where a word is the name of no file
FILES_OF_MODELS = (".gguf", ".safetensors", ".bin", ".pt", ".pth")  # no folder, and no name on the hub either
SHOWN_FILES = 3
PATH_STARTS = ("./", "../", "/", "~")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def made_absolute(values: dict[str, Any], folder: Path, above: Key = ()) -> dict[str, Any]:
    """A copy of a recipe's values in which files and folders are absolute; relative ones start at `folder`."""
    made = {}
    for name, value in values.items():
        key = (*above, name)
        if isinstance(value, dict):
            value = made_absolute(value, folder, key)
        elif key == SOURCES and isinstance(value, list | tuple):
            tables = ((str(number), each) for number, each in enumerate(value))
            value = [made_absolute({number: each}, folder, key)[number] for number, each in tables]
        elif isinstance(value, str) and value.strip() in WORDS.get(key, ()):
            value = value.strip()
        elif isinstance(value, str) and _is_path(key, value.strip(), folder):
            value = os.path.abspath(folder / os.path.expanduser(value.strip()))
        made[name] = value
    return made


def names_rows(key: Key) -> bool:
    """Whether a setting names rows to read."""
    return key in DATA or (key[:-2] == SOURCES and key[-1] == "train")


def fault_of(key: Key, value: Any) -> Fault | None:
    """What is wrong with what a setting names, after `made_absolute`; None where it is there or is a hub's name."""
    if value in WORDS.get(key, ()):
        return None
    is_asked = key in (*MODELS, START, *TEMPLATES, GENERAL) or names_rows(key)
    if not is_asked or not isinstance(value, str) or not value.strip():
        return None
    kind = "folder" if key in (*MODELS, START) else "file"
    if not os.path.isabs(value):
        fits = value == "demo" or HUB_NAME.fullmatch(value.strip())
        wrong = f"{shown(value)} is neither a {kind} beside the recipe nor a hub name such as owner/name."
        return None if fits else (key, f"{dotted(key)}: {wrong}")
    if os.path.isdir(value) if kind == "folder" else os.path.isfile(value):
        return None
    if names_rows(key) and files_of(Path(value)):
        return None
    if names_rows(key) and is_pattern(Path(value)):
        return key, f"{dotted(key)}: no file is named like {shown(value)}."
    return (
        key,
        f"{dotted(key)}: {_what_is_there(Path(value), kind)}{_built_in(Path(value)) if key in TEMPLATES else ''}",
    )


def _built_in(path: Path) -> str:
    """Which templates qtune has, behind a space, as what was meant may be the name of one."""
    near = get_close_matches(path.name.lower(), BUILT_IN, n=1)
    names = ", ".join(BUILT_IN)
    return f' Did you mean "{near[0]}", of qtune\'s own {names}?' if near else f" qtune has {names} itself."


def _is_path(key: Key, value: str, folder: Path) -> bool:
    """Whether a name is a path: it looks like one, or something of that name lies in `folder`."""
    if key in WORDS:
        return bool(value)
    if (key not in (*MODELS, START) and not names_rows(key)) or value in ("", "demo"):
        return False
    looks = value in (".", "..") or value.startswith(PATH_STARTS)
    if names_rows(key):
        path = folder / value
        return looks or value.lower().endswith(DATA_SUFFIXES) or os.path.exists(path) or is_pattern(path)
    return looks or value.lower().endswith(FILES_OF_MODELS) or os.path.isdir(folder / value)


def _what_is_there(path: Path, kind: str) -> str:
    """A sentence on a path where no file, or no folder, is."""
    if os.path.exists(path):
        is_wrong = f"{path} is a {'file' if kind == 'folder' else 'folder'}, and a {kind} is needed."
        return f"{is_wrong}{_file_of(path)}" if kind == "file" else is_wrong
    if not os.path.isdir(path.parent):
        return f"there is no folder {_printable(str(path.parent))}."
    is_kind = os.path.isdir if kind == "folder" else os.path.isfile
    by_stem = {Path(name).stem: name for name in _names_in(path.parent) if is_kind(path.parent / name)}
    near = [by_stem[stem] for stem in get_close_matches(path.stem, by_stem, n=1)]
    return f"there is no {kind} {_printable(path.name)} in {path.parent}." + (
        f" Did you mean {near[0]}?" if near else ""
    )


def _file_of(folder: Path) -> str:
    """How the rows in a folder become one file, as a sentence behind a space; nothing where it holds none."""
    names = _names_in(folder)
    if SAVED_SPLITS in names:
        splits = sorted(name for name in names if (folder / name / SAVED).is_file())
        return f" It holds splits that save_to_disk wrote: name one, such as {folder / splits[0]}." if splits else ""
    found = sorted(
        str(Path(inner, name))
        for inner in ("", "data")
        for name in _names_in(folder / inner)
        if name.lower().endswith(DATA_SUFFIXES) and name not in ("README.md", "dataset_infos.json")
    )
    more = ", …" if len(found) > SHOWN_FILES else ""
    return f" It holds {', '.join(found[:SHOWN_FILES])}{more}: name one file." if found else ""


def _names_in(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _printable(text: str) -> str:
    return text if text.isprintable() else shown(text)
