"""What qtune can make again, kept between runs: in `$QTUNE_CACHE`, else in `~/.cache/qtune`; QTUNE_CACHE=off keeps
nothing, and QTUNE_CACHE_SIZE (`30GiB`) says how much.

An entry is a sealed folder under its kind ("tokens", "nf4"), named by the key of all that it follows from. It is
written beside its place, then renamed, and given out only where every sum is right: a broken one is removed, and made
again. Entries of every kind share the room there is; what was unused for longest goes first. A cache that cannot be
written is not an error.

These are variables and no keys of the recipe because where files are kept is a matter of the machine: no run comes out
different for it.
"""

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtune import atomic_files
from qtune.errors import UserError
from qtune.units import GIB, parse_bytes

VARIABLE, OFF, SIZE_VARIABLE = "QTUNE_CACHE", "off", "QTUNE_CACHE_SIZE"
LARGEST_BYTES, LARGEST_FREE_FRACTION = 64 * GIB, 0.25  # the lesser of both where nobody says: a dozen bases of 8B
ENTRY, STAGED, ABANDONED_SECONDS = "entry.json", "staged-", 24 * 3600


@dataclass(frozen=True)
class Entry:
    """One thing kept at `path`: of a `kind`, made of `what`, last used at `used` (seconds since 1970)."""

    path: Path
    kind: str
    what: str
    bytes: int
    used: float


def root() -> Path | None:
    """The whole cache's folder; None where nothing is to be kept."""
    asked = os.environ.get(VARIABLE)
    if asked == OFF:
        return None
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        return Path(asked).expanduser() if asked else caches / "qtune"
    except RuntimeError:  # nobody's home
        return None


def folder(kind: str) -> Path | None:
    """Where things of one kind stand; None where none are to be kept."""
    home = root()
    return home and home / kind


def new_folder(parent: Path | None) -> Path | None:
    """A new folder in `parent` that nobody else can read, to write an entry into; None where there can be none."""
    if parent is None:
        return None
    try:
        parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=STAGED, dir=parent))
    except OSError:
        return None


def keep(kind: str, key: str, stage: Path, what: str, facts: dict[str, Any]) -> None:
    """Make the folder `stage` of `new_folder` the entry `key`, with `facts` for whoever reads it.

    Where that fails there is no such entry, and `stage` stays for its owner to remove.
    """
    home = folder(kind)
    if home is None or stage.parent != home:
        return
    with suppress(OSError):
        (stage / ENTRY).write_text(json.dumps({"what": what, "facts": facts}, indent=1), encoding="utf-8")
        atomic_files.seal(stage)
        if make_room(_bytes_in(stage)):
            shutil.rmtree(home / key, ignore_errors=True)
            stage.rename(home / key)


def find(kind: str, key: str) -> tuple[Path, dict[str, Any]] | None:
    """The folder of the entry `key` and its facts, if it is there and whole."""
    home = folder(kind)
    if home is None or not (home / key).is_dir():
        return None
    path = home / key
    try:
        if atomic_files.what_is_broken(path):
            raise ValueError("a sum is wrong")
        facts = json.loads((path / ENTRY).read_text(encoding="utf-8"))["facts"]
    except (OSError, ValueError, KeyError, TypeError):
        shutil.rmtree(path, ignore_errors=True)
        return None
    with suppress(OSError):  # a cache that may only be read
        os.utime(path)
    return path, facts


def entries() -> list[Entry]:
    """All that is kept, the longest unused first."""
    home = root()
    found = [] if home is None else [path for path in home.glob("*/*") if re.fullmatch(r"[0-9a-f]{64}", path.name)]
    return sorted(_described(found), key=lambda entry: entry.used)


def _described(paths: list[Path]) -> Iterator[Entry]:
    """Without those that another process takes away meanwhile."""
    for path in paths:
        with suppress(OSError):
            try:
                what = str(json.loads((path / ENTRY).read_text(encoding="utf-8"))["what"])
            except (ValueError, KeyError, TypeError):
                what = "?"
            yield Entry(path, path.parent.name, what, _bytes_in(path), path.stat().st_mtime)


def largest_bytes() -> int:
    """What all entries together may take. Raises UserError for a QTUNE_CACHE_SIZE that is no size."""
    asked = os.environ.get(SIZE_VARIABLE)
    if asked is None:
        home = root()
        there = next((path for path in (home, *home.parents) if path.exists()), None) if home else None
        free = shutil.disk_usage(there).free if there else 0
        return min(LARGEST_BYTES, int(LARGEST_FREE_FRACTION * (free + _held_bytes())))
    size = parse_bytes(asked)
    if size is None:
        raise UserError(f"{SIZE_VARIABLE}={asked!r} is no size. Write it as 30GiB, or set {VARIABLE}={OFF}.")
    return size


def make_room(needed_bytes: int) -> bool:
    """Remove what crashed runs left and, if that helps, the entries unused for longest; False where it does not."""
    home = root()
    if home is None:
        return False
    for left in home.glob(f"*/{STAGED}*"):
        if left.stat().st_mtime < time.time() - ABANDONED_SECONDS:
            shutil.rmtree(left, ignore_errors=True)
    largest, oldest_first = largest_bytes(), entries()
    if needed_bytes > largest:
        return False
    held = sum(entry.bytes for entry in oldest_first)
    while oldest_first and held + needed_bytes > largest:
        oldest = oldest_first.pop(0)
        held -= oldest.bytes
        remove(oldest)
    return True


def remove(entry: Entry) -> None:
    shutil.rmtree(entry.path, ignore_errors=True)


def _held_bytes() -> int:
    return sum(entry.bytes for entry in entries())


def _bytes_in(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir())
