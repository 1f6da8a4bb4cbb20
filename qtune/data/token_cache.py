"""Tokenised rows kept between runs, each entry under a key of all it follows from: content, settings, tokenizer,
template, date, and this code (`key_of`).

They stand under "tokens" in the machine's `cache_dir`, an entry a folder.
"""

import fcntl
import functools
import hashlib
import importlib.metadata
import json
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from datetime import time as time_of_day
from pathlib import Path
from typing import Any

import tokenizers
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedTokenizerBase

from qtune import cache_dir
from qtune.data.dataset import FILE, MOST_UNWRITTEN_BYTES, Blocks, map_blocks, read_index
from qtune.data.sources import Part, Source
from qtune.data.tokenize import tokenizer_sha256
from qtune.errors import MachineError
from qtune.recipe.schema import Recipe
from qtune.units import format_bytes

LIBRARIES = ("transformers", "tokenizers", "jinja2")
DATE = "strftime_now"  # what a template asks transformers for the date with
KIND, ARRAYS = "tokens", "arrays.safetensors"
ROOM_OF_A_BYTE = 2.5  # bytes on disk of one of a file: its text again, and four bytes a token; measured 2.0 of chats


@dataclass(frozen=True)
class CachedRows:
    """What is kept: rows, arrays of numbers about them, and facts that JSON can hold."""

    blocks: Blocks
    arrays: dict[str, NDArray[Any]]
    facts: dict[str, Any]


@contextmanager
def staged() -> Iterator[Path | None]:
    """A folder to write blocks into, which ends with the context unless it was kept. Mapped files stay readable.

    Where the cache is of no use it stands with the machine's temporary files; None where those are of no use either.
    """
    path = cache_dir.new_folder(cache_dir.folder(KIND)) or cache_dir.new_folder(Path(tempfile.gettempdir()))
    try:
        yield path
    finally:
        if path is not None:
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def being_made(key: str | None, say_waiting: Callable[[], None]) -> Iterator[bool]:
    """While the entry `key` is made here; whether another process was at it, which was waited for.

    So the ranks of a run on one machine tokenise once. Of those that waited none waits again, as there may be no entry
    in the end.
    """
    home = cache_dir.folder(KIND)
    with ExitStack() as held:
        has_waited = False
        with suppress(OSError):  # a cache that cannot be written, or a file system without locks
            if key is not None and home is not None:
                home.mkdir(parents=True, exist_ok=True)
                path = home / f"{key}.lock"
                lock = held.enter_context(path.open("w"))
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    held.callback(path.unlink, missing_ok=True)
                except BlockingIOError:
                    say_waiting()
                    fcntl.flock(lock, fcntl.LOCK_EX)
                    held.close()
                    has_waited = True
        yield has_waited


def refuse_without_room(folder: Path | None, parts: Sequence[Part]) -> None:
    """Raises MachineError where `folder` has no room for the tokens of files that memory would not hold either."""
    sources = [part.source for part in parts if part.data.max_rows is None]
    needed = ROOM_OF_A_BYTE * sum(source.bytes for source in sources)
    if folder is None or needed <= MOST_UNWRITTEN_BYTES:
        return
    free = shutil.disk_usage(folder).free
    if free < needed:
        names = " and ".join(source.name for source in sources)
        raise MachineError(
            f"{names}: tokenised, the rows take about {format_bytes(needed)} of disk, and {format_bytes(free)} are free"
            f" in {folder.parent}. Free some, or set {cache_dir.VARIABLE} to a folder on another disk."
        )


def keep(key: str, path: Path, arrays: dict[str, NDArray[Any]], facts: dict[str, Any], what: str) -> None:
    """Make the staged folder at `path`, which holds all blocks, the entry `key`; where that fails there is none."""
    with suppress(SafetensorError, OSError):
        save_file(arrays, path / ARRAYS)
        cache_dir.keep(KIND, key, path, what, facts)


def load(key: str) -> CachedRows | None:
    """The entry `key`, if it is there and whole."""
    entry = cache_dir.find(KIND, key)
    if entry is None:
        return None
    path, facts = entry
    try:
        blocks = map_blocks(path / FILE, read_index(path / FILE))
        arrays = load_file(path / ARRAYS)
    except (OSError, ValueError, SafetensorError):
        return None
    return CachedRows(blocks, arrays, facts)


def key_of(recipe: Recipe, sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The key of these rows; None where it cannot be told what they follow from.

    Files go by name and content, so that a folder may move.
    """
    contents = [source.fingerprint for source in sources]
    tokenizer_facts = _facts_of(tokenizer)
    dates = _dates_written(str(tokenizer.chat_template or ""), datetime.now())
    if tokenizer_facts is None or dates is None or None in contents:
        return None
    names = [source.folder + Path(source.name).name if source.dataset is None else source.name for source in sources]
    settings = [
        names,
        recipe.data.model_dump(mode="json", exclude={"check", "streaming", "train", "held_out", "sources"}),
    ]
    settings += [source.model_dump(mode="json", exclude={"train"}) for source in recipe.data.sources]
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
