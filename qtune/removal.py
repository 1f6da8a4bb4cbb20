"""Run folders, or the checkpoints in them, taken off the disk."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from qtune import atomic_files
from qtune.errors import RunFolderError
from qtune.rundir import RunDir, bytes_below, is_run


@dataclass(frozen=True)
class Removal:
    """One folder that is to go: a run, or the checkpoints of one."""

    run: RunDir
    path: Path
    bytes: int

    @classmethod
    def of(cls, path: Path, only_checkpoints: bool) -> "Removal":
        """Raises RunFolderError for a link, for what is no run folder, and for a run without checkpoints."""
        if path.is_symlink():
            raise RunFolderError(f"{path}: is a link to {path.resolve()}. Name that, if it is what is to go.")
        run = RunDir.open_to_resume(path)
        if not is_run(path):
            raise RunFolderError(f"{path}: is no run folder, it has no {run.recipe.name}.")
        goes = run.checkpoints if only_checkpoints else run.path
        if not goes.is_dir():
            raise RunFolderError(f"{path}: has no checkpoints.")
        return cls(run, goes, bytes_below(goes))


def remove(removals: list[Removal]) -> None:
    """All of them or none: raises RunFolderError, before any is removed, where a process is at work in one."""
    with ExitStack() as held:
        for each in removals:
            held.enter_context(each.run.held())
        for each in removals:
            if each.path == each.run.checkpoints:
                each.run.checkpoints_removed.touch()
            atomic_files.remove(each.path)
