"""Which base this is: the SHA-256 of its weights, remembered for as long as nobody writes to them, and a glance.

A base is hashed when a run starts, goes on, is merged and exported, which for one of 16 GB is many seconds each time.
So the hash is kept beside what the file system says of the files (`cache_dir`, under "bases"), as git does in its
index: size, inode, and when content and inode were last changed. Who writes to a file changes that; who means to
deceive, and may set a machine's clock, can deceive.
"""

import hashlib
import json
import time
from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import Any

from qtune import atomic_files, cache_dir
from qtune.errors import DiskFull, ModelError, RunFolderError
from qtune.recipe import base_kind
from qtune.recipe.text_part import files_without_text
from qtune.rundir import RunDir, write_json

BYTES_AT_ONCE = 1 << 20
AT_REST_NS = 2_000_000_000  # the coarsest clock of a file system: what is written later than that shows


def fingerprint(folder: Path, stop: Event | None = None) -> str:
    """SHA-256 over the names and bytes of the weight files; the identity of a base. Of no use once `stop` is set."""
    state = _state(folder)
    known = _known(folder, state)
    if known is not None:
        return known
    started = time.time_ns()
    digest = hashlib.sha256()
    for path in _weights_in(folder):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while (stop is None or not stop.is_set()) and (block := file.read(BYTES_AT_ONCE)):
                digest.update(block)
    is_whole = stop is None or not stop.is_set()
    if is_whole and _state(folder) == state and _last_change(state) < started - AT_REST_NS:
        _remember(folder, state, digest.hexdigest())
    return digest.hexdigest()


def glance(folder: Path) -> str:
    """SHA-256 over the names of the weight files and a glance at each: milliseconds, not minutes.

    It tells one base from another, also from one of the same shapes that was trained further.
    """
    digest = hashlib.sha256()
    for path in _weights_in(folder):
        digest.update(f"{path.name} {atomic_files.glance_at(path)}".encode())
    return digest.hexdigest()


def refuse_unusable(run: RunDir) -> None:
    """Raises UserError for a run without an adapter, or whose base is not where it was, or is another."""
    lock = run.read_lock()
    if not (run.adapter / base_kind.ADAPTER_CONFIG).is_file():
        raise RunFolderError(f"{run.path}: has no adapter yet. Go on with it: qtune resume {run.path}")
    folder = Path(lock.base_name)
    if not folder.is_absolute():
        return
    if not folder.exists():
        raise ModelError(
            f"{run.path}: its base is not in {folder} any more. If it was moved, say where it is with --base FOLDER."
        )
    if fault := base_kind.fault_of(folder, trust_remote_code=lock.trusts_remote_code):
        raise ModelError(f"{'--base' if run.base else f'{run.path}: its base'}: {fault}")
    refuse_other_base(run, folder)


def refuse_other_base(run: RunDir, folder: Path) -> None:
    """Raises ModelError where, at a glance, the weights in `folder` are others than those the run was trained on."""
    then = run.read_lock().base
    expected = then.glance_sha256
    if expected is not None and glance(folder) != expected:
        raise ModelError(
            f"{folder}: is not the base of {run.path}; its weights are others than the run was trained on. Put back the"
            f" base the run names ({then.name})."
        )


def _weights_in(folder: Path) -> list[Path]:
    """Those with some of the text model in them: others may come later, when it is merged."""
    apart = files_without_text(folder)
    return sorted(path for path in folder.glob("*.safetensors") if path.is_file() and path.name not in apart)


def _state(folder: Path) -> list[list[Any]]:
    """What the file system says of every weight file; a list, as JSON will have it."""
    found = [(path.name, path.stat()) for path in _weights_in(folder)]
    return [[name, file.st_size, file.st_ino, file.st_mtime_ns, file.st_ctime_ns] for name, file in found]


def _last_change(state: list[list[Any]]) -> int:
    return max((changed for _, _, _, *times in state for changed in times), default=0)


def _known(folder: Path, state: list[list[Any]]) -> str | None:
    path = _kept_at(folder)
    try:
        kept = json.loads(path.read_text(encoding="utf-8")) if path else None
        return str(kept["sha256"]) if kept and kept["state"] == state else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remember(folder: Path, state: list[list[Any]], sha256: str) -> None:
    """Where that fails, the next one hashes it again."""
    path = _kept_at(folder)
    if path is not None:
        with suppress(OSError, DiskFull):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"folder": str(folder.resolve()), "state": state, "sha256": sha256})


def _kept_at(folder: Path) -> Path | None:
    home = cache_dir.folder("bases")
    return home and home / f"{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()}.json"
