"""The folder, or file, that a merge or an export writes: room for it, how far it is, and into its place in one step."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from qtune import atomic_files
from qtune.errors import MachineError
from qtune.units import MIB, format_bytes

Progress = Callable[[int, int, str], None]

SPARE_DISK_BYTES = 64 * MIB  # tokenizer files and reports


def check_disk(output: Path, weight_bytes: int, what: str) -> None:
    """Make the folder that `output` is to stand in; MachineError where that fails, or its disk is too small."""
    make_folder(output.parent, output)
    free = shutil.disk_usage(output.parent).free
    needed = weight_bytes + SPARE_DISK_BYTES
    if free < needed:
        raise MachineError(
            f"{output}: the {what} needs {format_bytes(needed)} and {output.parent} has {format_bytes(free)} free. Free"
            " some, or name an --output on another disk."
        )


def make_folder(path: Path, output: Path) -> None:
    """Make `path` and what leads to it; MachineError, about `output`, where that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise MachineError(f"{output}: cannot be made ({fault.strerror}). Name another --output.") from None


def publish(staged: Path, output: Path) -> None:
    """Move a finished folder into place in one step, and wait until both directories are on the disk."""
    atomic_files.flush(staged)
    if output.exists():
        output.rmdir()
    os.rename(staged, output)
    atomic_files.flush(output.parent)


def counting(progress: Progress | None, total: int) -> Callable[[str], None]:
    """`progress` for one tensor more each time it is called with a name."""
    done = 0

    def tell(name: str) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total, name)

    return tell
