"""Files and folders that are there whole or not at all, and folders that know when a byte in them has changed.

Each is made beside its place, flushed to disk and renamed into it. SHA256SUMS, in the format of `sha256sum -c`, lists
every file of a sealed folder, so that a missing, added, cut or changed file is found before anything is read.
"""

import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from qtune.errors import DiskFull

SUMS = "SHA256SUMS"
FOLDER_MODE, FILE_MODE = 0o755, 0o644
GLANCES, GLANCE_BYTES = 64, 4096
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
RUST_OS_ERROR = re.compile(r"(?:\(os error |code: )(\d+)[,)]")  # safetensors, whose errors have no errno


@contextmanager
def filled_in_place(path: Path, replaces: bool = True) -> Iterator[Path]:
    """A new folder to fill; when the block ends it is flushed to disk and takes the place of `path`.

    What goes wrong leaves `path` as it was. Raises DiskFull where the disk has no room for it, and, unless it
    `replaces` what is there, OSError where `path` holds anything by then.
    """
    with refusing_full_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        try:
            yield stage
            _settle(stage)
            _take_place(stage, path) if replaces else os.rename(stage, path)
            flush(path.parent)
        except BaseException:
            shutil.rmtree(stage, ignore_errors=True)
            raise


def write_text(path: Path, text: str) -> None:
    """Write beside `path`, flush to disk, then rename over it. Raises DiskFull, and leaves `path` as it was then."""
    with refusing_full_disk(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, FILE_MODE)
            os.replace(name, path)
            flush(path.parent)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def _take_place(stage: Path, path: Path) -> None:
    if not path.exists():
        os.rename(stage, path)
        return
    old = _set_aside(path)
    try:
        os.rename(stage, path)
    except BaseException:
        os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def remove(path: Path) -> None:
    """Remove a folder, of which no half is ever seen in its place."""
    shutil.rmtree(_set_aside(path), ignore_errors=True)


def _set_aside(path: Path) -> Path:
    """`path` under a hidden name beside it."""
    aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
    os.rename(path, aside)
    return aside


def _settle(folder: Path) -> None:
    """Have all of it on the disk, and readable by others: temporary folders, and the files of safetensors, are not."""
    for path in [*folder.rglob("*"), folder]:
        path.chmod(FOLDER_MODE if path.is_dir() else FILE_MODE)
        flush(path)


def flush(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def refusing_full_disk(path: Path) -> Iterator[None]:
    """A disk that has no room left becomes a DiskFull that names `path`; a library's own error for it too."""
    try:
        yield
    except Exception as fault:
        if not _says_full(fault):
            raise
        raise DiskFull(
            f"{path}: cannot be written, the disk is full. Free some space and go on with `qtune resume`."
        ) from None


def _says_full(fault: Exception) -> bool:
    if isinstance(fault, OSError):
        return fault.errno in FULL
    found = RUST_OS_ERROR.search(str(fault))
    return found is not None and int(found[1]) in FULL


def seal(folder: Path) -> None:
    """Write SHA256SUMS over every other file in `folder`."""
    (folder / SUMS).write_text(_sums(folder), encoding="utf-8")


def what_is_broken(folder: Path) -> str | None:
    """What of a sealed folder is not as it was sealed, as a clause such as `state.json is missing`; None if nothing."""
    try:
        before = (folder / SUMS).read_bytes().decode(errors="backslashreplace")
        now = _sums(folder)
    except FileNotFoundError:
        return f"it has no {SUMS}"
    except OSError as fault:
        return f"{fault.filename} cannot be read ({fault.strerror})"
    return None if before == now else _difference(_by_name(before), _by_name(now))


def _by_name(sums: str) -> dict[str, str]:
    return dict(line.split("  ", 1)[::-1] for line in sums.splitlines() if "  " in line)


def _difference(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    changed = next((name for name, digest in now.items() if name in before and before[name] != digest), None)
    if changed is not None:
        return f"{changed} was changed after it was written"
    missing = next((name for name in before if name not in now), None)
    if missing is not None:
        return f"{missing} is missing"
    added = next((name for name in now if name not in before), None)
    return f"{SUMS if added is None else added} was {'changed' if added is None else 'added'} after it was written"


def _sums(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / SUMS)
    return "".join(f"{digest_of(path)}  {_name(path, folder)}\n" for path in files)


def _name(path: Path, folder: Path) -> str:
    """As text that can be written and shown: a file that was added may be called anything."""
    return os.fsencode(path.relative_to(folder)).decode(errors="backslashreplace")


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of_all(files: Sequence[Path]) -> str:
    """SHA-256 of a file; of several, of their names and digests."""
    if len(files) == 1:
        return digest_of(files[0])
    return hashlib.sha256("".join(f"{digest_of(path)}  {path.name}\n" for path in files).encode()).hexdigest()


def glance_at(path: Path) -> str:
    """SHA-256 over the size of a file and a few pieces of it, from end to end: milliseconds, whatever the size.

    It tells one file from another, and a whole one from a part; not that every byte is as it was.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for piece in range(GLANCES):
            file.seek(max(0, size - GLANCE_BYTES) * piece // (GLANCES - 1))
            digest.update(file.read(GLANCE_BYTES))
    return digest.hexdigest()
