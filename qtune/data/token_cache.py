"""Tokenised rows kept between runs, each entry under a key of all it follows from (`cache_key`).

They stand under "tokens" in the machine's `cache_dir`. An entry is a folder of safetensors files and one JSON file with
the SHA-256 of each. It is written beside its place, then renamed, and read only where every sum is right: a broken one
is removed, and its rows are made again. A cache that cannot be written is not an error.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qtune import atomic_files, cache_dir
from qtune.data.dataset import Block, Ints, block_files, map_block
from qtune.units import GIB

LARGEST_BYTES, LARGEST_FREE_FRACTION = 8 * GIB, 0.1  # the lesser of both; what was unused longest goes first
STAGED, ABANDONED_SECONDS = "staged-", 24 * 3600
ARRAYS, FACTS = "arrays.safetensors", "entry.json"


@dataclass(frozen=True)
class Entry:
    """What is kept: rows, arrays of numbers about them, and facts that JSON can hold."""

    blocks: tuple[Block, ...]
    arrays: dict[str, Ints]
    facts: dict[str, Any]


def folder() -> Path | None:
    """Where entries stand; None where none are to be kept."""
    return cache_dir.folder("tokens")


@contextmanager
def staged() -> Iterator[Path | None]:
    """A folder to write blocks into, which ends with the context unless it was kept. Mapped files stay readable.

    Where the cache is of no use it stands with the machine's temporary files; None where those are of no use either.
    """
    path = _new_folder(folder()) or _new_folder(Path(tempfile.gettempdir()))
    try:
        yield path
    finally:
        if path is not None:
            shutil.rmtree(path, ignore_errors=True)


def _new_folder(parent: Path | None) -> Path | None:
    """A folder that nobody else can read."""
    if parent is None:
        return None
    try:
        parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=STAGED, dir=parent))
    except OSError:
        return None


def keep(key: str, path: Path, arrays: dict[str, Ints], facts: dict[str, Any]) -> None:
    """Make the staged folder at `path`, which holds all blocks, the entry `key`; where that fails there is none."""
    home = folder()
    if path.parent != home:
        return
    try:
        save_file({name: torch.from_numpy(array) for name, array in arrays.items()}, path / ARRAYS)
        entry = {"files": _sums(path), "facts": facts}
        text = json.dumps({"sha256": _sum_of(entry), "entry": entry}, indent=1)
        (path / FACTS).write_text(text, encoding="utf-8")
        if _make_room(home, _bytes_in(path)):
            shutil.rmtree(home / key, ignore_errors=True)
            path.rename(home / key)
    except (SafetensorError, OSError):
        return


def load(key: str) -> Entry | None:
    """The entry `key`, if it is there and whole."""
    home = folder()
    if home is None or not (home / key).is_dir():
        return None
    path = home / key
    try:
        described = json.loads((path / FACTS).read_text(encoding="utf-8"))
        entry = described["entry"]
        if described["sha256"] != _sum_of(entry) or entry["files"] != _sums(path):
            raise ValueError("a sum is wrong")
        blocks = tuple(map_block(file) for file in block_files(path))
        arrays = {name: tensor.numpy() for name, tensor in load_file(path / ARRAYS).items()}
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        shutil.rmtree(path, ignore_errors=True)
        return None
    with suppress(OSError):  # a cache that may only be read
        os.utime(path)
    return Entry(blocks, arrays, entry["facts"])


def _sums(path: Path) -> dict[str, str]:
    return {file.name: atomic_files.digest_of(file) for file in path.glob("*.safetensors")}


def _sum_of(entry: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()


def _make_room(home: Path, needed_bytes: int) -> bool:
    """Remove what crashed runs left and, if that helps, the entries unused for longest; False where it does not."""
    for left in home.glob(f"{STAGED}*"):
        if left.stat().st_mtime < time.time() - ABANDONED_SECONDS:
            shutil.rmtree(left, ignore_errors=True)
    largest = min(LARGEST_BYTES, int(LARGEST_FREE_FRACTION * shutil.disk_usage(home).free))
    if needed_bytes > largest:
        return False
    entries = [path for path in home.iterdir() if re.fullmatch(r"[0-9a-f]{64}", path.name)]
    oldest_first = sorted(entries, key=lambda path: path.stat().st_mtime)
    held = sum(map(_bytes_in, entries))
    while oldest_first and held + needed_bytes > largest:
        oldest = oldest_first.pop(0)
        held -= _bytes_in(oldest)
        shutil.rmtree(oldest, ignore_errors=True)
    return True


def _bytes_in(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir())
