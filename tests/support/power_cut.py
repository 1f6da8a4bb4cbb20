"""What a power cut could take: the order of write, fsync of a file, rename and fsync of a folder, as databases test it.

A file is safe once it was synced after its last change, a folder once it was after its last entry came. What is moved
into place has to be safe by then, and the folder that it is moved into is synced behind it.
"""

import os
import stat
from pathlib import Path

import pytest

State = tuple[object, ...]


def _state(path: str | int) -> State:
    """What a sync puts on the disk: size and time of a file, the names in a folder."""
    found = os.stat(path)
    if stat.S_ISDIR(found.st_mode):
        return (*sorted(os.listdir(path)),)
    return found.st_size, found.st_mtime_ns


class Disk:
    """What was moved into place below `folder`, and what of it a power cut could have lost, or nobody else could
    read."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path):
        self._folder = folder
        self.moved: list[Path] = []
        self.lost: list[str] = []
        self.private: list[str] = []
        self._safe: dict[int, State] = {}
        self._unsettled: dict[Path, Path] = {}  # by what was moved, the folder that it was moved into
        self._fsync, self._rename, self._replace = os.fsync, os.rename, os.replace
        patch.setattr(os, "fsync", self._note_sync)
        patch.setattr(os, "rename", lambda source, target: self._note_move(self._rename, source, target))
        patch.setattr(os, "replace", lambda source, target: self._note_move(self._replace, source, target))

    @property
    def unsettled(self) -> list[str]:
        """What was moved, and stands there by no name on the disk yet."""
        return sorted(map(str, self._unsettled))

    def _note_sync(self, handle: int) -> None:
        state = _state(handle)  # what comes while it is synced is not safe
        self._fsync(handle)
        inode = os.fstat(handle).st_ino
        self._safe[inode] = state
        gone = [path for path, folder in self._unsettled.items() if folder.exists() and folder.stat().st_ino == inode]
        for path in gone:
            del self._unsettled[path]

    def _note_move(self, move, source: str | Path, target: str | Path) -> None:
        source, target = Path(source), Path(target)
        is_shown = self._folder in target.parents and not target.name.startswith(".")  # which are out of the way
        for path in [source, *source.rglob("*")] if is_shown else ():
            if self._safe.get(path.stat().st_ino) != _state(str(path)):
                self.lost.append(str(target / path.relative_to(source)))
            if path.stat().st_mode & 0o044 != 0o044:
                self.private.append(str(target / path.relative_to(source)))
        move(source, target)
        if is_shown:
            self.moved.append(target)
            self._unsettled[target] = target.parent
