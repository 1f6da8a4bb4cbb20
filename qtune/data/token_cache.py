"""Tokenised rows kept between runs, each entry under a key of all it follows from: content, settings, tokenizer,
template, date, and this code (`key_of`).

They stand under "tokens" in the machine's `cache_dir`. An entry is a folder of safetensors files and one JSON file with
the SHA-256 of each. It is written beside its place, then renamed, and read only where every sum is right: a broken one
is removed, and its rows are made again. A cache that cannot be written is not an error.
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from datetime import time as time_of_day
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from qtune import atomic_files, cache_dir
from qtune.data.dataset import Block, Ints, block_files, map_block
from qtune.data.sources import Source
from qtune.data.tokenize import tokenizer_sha256
from qtune.recipe.schema import Recipe
from qtune.units import GIB

LARGEST_BYTES, LARGEST_FREE_FRACTION = 8 * GIB, 0.1  # the lesser of both; what was unused longest goes first
LIBRARIES = ("transformers", "tokenizers", "jinja2")
DATE = "strftime_now"  # what a template asks transformers for the date with
STAGED, ABANDONED_SECONDS = "staged-", 24 * 3600
ARRAYS, FACTS = "arrays.safetensors", "entry.json"


@dataclass(frozen=True)
class CachedRows:
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


def load(key: str) -> CachedRows | None:
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
    return CachedRows(blocks, arrays, entry["facts"])


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


def key_of(recipe: Recipe, sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The key of these rows; None where it cannot be told what they follow from.

    Files go by name and content, so that a folder may move.
    """
    contents = [source.fingerprint() for source in sources]
    tokenizer_facts = _facts_of(tokenizer)
    dates = _dates_written(str(tokenizer.chat_template or ""), datetime.now())
    if tokenizer_facts is None or dates is None or None in contents:
        return None
    names = [Path(source.name).name if source.dataset is None else source.name for source in sources]
    settings = recipe.data.model_dump(mode="json", exclude={"check"}) | {"train": names[0], "held_out": names[1:]}
    planted = [recipe.evaluate.canaries, recipe.evaluate.canary_repeats]
    versions = [platform.python_version(), *map(importlib.metadata.version, LIBRARIES)]
    facts = [contents, settings, planted, recipe.train.seed, tokenizer_facts, dates, versions, _code_sha256()]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _facts_of(tokenizer: PreTrainedTokenizerBase) -> list[Any] | None:
    """All that a tokenizer and its template do by; None for one that is a program of its own."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer) or not type(tokenizer).__module__.startswith("transformers."):
        return None
    return [
        type(tokenizer).__name__,
        tokenizer_sha256(tokenizer),
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        str(tokenizer.chat_template or ""),
        str(getattr(tokenizer, "clean_up_tokenization_spaces", None)),
    ]


def _dates_written(template: str, now: datetime) -> list[str] | None:
    """Today as the template writes it; None where it writes the time, or asks in a way that is not in plain sight."""
    formats = [call[2] for call in re.finditer(DATE + r"\s*\(\s*(['\"])(.*?)\1\s*\)", template)]
    asked = len(re.findall(DATE + r"(?!\s+is\s+(?:not\s+)?defined)", template))
    morning, night = (datetime.combine(now.date(), moment) for moment in (time_of_day.min, time_of_day.max))
    written = [morning.strftime(form) for form in formats]
    return written if asked == len(formats) and written == [night.strftime(form) for form in formats] else None


@functools.cache
def _code_sha256() -> str:
    """Of this room's code as it was loaded: who changes how rows are made need not remember that some are kept."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
