"""All rows of a source at once, for tests that look at each."""

from dataclasses import dataclass
from typing import Literal

from qtune.data.rows import Dropped, RawRow
from qtune.data.sources import Source, refuse_bad_rows


@dataclass(frozen=True)
class Rows:
    """Everything a source held."""

    rows: tuple[RawRow, ...]
    dropped: tuple[Dropped, ...]


def read_rows(
    source: str, split: str = "train", max_rows: int | None = None, on_bad_row: Literal["error", "drop"] = "error"
) -> Rows:
    """Rows of a file (an absolute path) or a hub dataset (a name). Raises DataError for what cannot be read."""
    every = list(Source.open(source, split).read(max_rows))
    dropped = tuple(row for row in every if isinstance(row, Dropped))
    if on_bad_row == "error":
        refuse_bad_rows(dropped, len(dropped))
    return Rows(tuple(row for row in every if isinstance(row, RawRow)), dropped)
