"""Where rows come from: files and hub datasets. Each row remembers its place."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qtune.data import hub
from qtune.data.files import Dropped, Row, read_file
from qtune.errors import DataError

SHOWN_FAULTS = 3


@dataclass(frozen=True)
class Rows:
    """Everything a source held."""

    rows: tuple[Row, ...]
    dropped: tuple[Dropped, ...]


def read_rows(
    source: str,
    split: str = "train",
    subset: str | None = None,
    max_rows: int | None = None,
    on_bad_row: Literal["error", "drop"] = "error",
) -> Rows:
    """Rows of a file (an absolute path) or a hub dataset (a name).

    Raises DataError for a source that cannot be read at all, and for bad rows unless they are to be dropped.
    """
    found = read_file(Path(source)) if Path(source).is_absolute() else _read_hub(source, split, subset)
    rows: list[Row] = []
    dropped: list[Dropped] = []
    for item in found:
        if max_rows is not None and len(rows) >= max_rows:
            break
        if isinstance(item, Row):
            rows.append(item)
        else:
            dropped.append(item)
    if on_bad_row == "error":
        refuse_bad_rows(dropped)
    if not rows and not dropped:
        raise DataError(f"{source}: holds no rows.")
    return Rows(tuple(rows), tuple(dropped))


def refuse_bad_rows(bad: Sequence[Dropped]) -> None:
    """Raises DataError naming the first bad rows, if there are any."""
    if not bad:
        return
    named = [f"{row.place}: {row.reason}." for row in bad[:SHOWN_FAULTS]]
    more = f"{len(bad) - SHOWN_FAULTS:,} more rows like these. " if len(bad) > SHOWN_FAULTS else ""
    raise DataError("\n".join([*named, f'{more}Mend them, or skip them with data.on_bad_row = "drop".']))


def _read_hub(name: str, split: str, subset: str | None) -> Iterator[Row]:
    for number, values in enumerate(hub.load(name, split, subset), start=1):
        yield Row(values, f"{name} row {number:,}")
