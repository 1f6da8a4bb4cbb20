"""Where rows come from: files and hub datasets. Each row remembers its place."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from qtune import atomic_files
from qtune.data import hub_datasets
from qtune.data.csv_dialect import SUFFIXES, Sheet
from qtune.data.file_readers import read_file
from qtune.data.rows import Dropped, RawRow
from qtune.errors import DataError
from qtune.recipe.schema import Data

SHOWN_FAULTS = 3


@dataclass(frozen=True)
class Source:
    """A file (an absolute path) or a hub dataset (a name, loaded once), whose rows can be read again and again."""

    name: str
    dataset: Iterable[dict[str, Any]] | None = None

    @classmethod
    def open(cls, name: str, split: str = "train", subset: str | None = None) -> "Source":
        """Raises DataError and MachineError for a hub dataset that cannot be had; files are looked at when read."""
        return cls(name) if Path(name).is_absolute() else cls(name, hub_datasets.load(name, split, subset))

    @classmethod
    def of_train(cls, data: Data) -> "Source":
        return cls.open(data.train, data.train_split, data.subset)

    @classmethod
    def of_held_out(cls, data: Data) -> "Source | None":
        """None where the held-out rows are some of data.train."""
        return None if data.held_out is None else cls.open(data.held_out, data.held_out_split, data.subset)

    def read(self, max_rows: int | None = None) -> Iterator[RawRow | Dropped]:
        """The rows one by one, `max_rows` of them at the most. Raises DataError for a file that cannot be read."""
        rows = 0
        for item in read_file(Path(self.name)) if self.dataset is None else self._of_dataset(self.dataset):
            if max_rows is not None and rows >= max_rows:
                return
            rows += isinstance(item, RawRow)
            yield item

    def _of_dataset(self, dataset: Iterable[dict[str, Any]]) -> Iterator[RawRow]:
        for number, values in enumerate(dataset, start=1):
            yield RawRow(values, f"{self.name} row {number:,}")

    @cached_property
    def notice(self) -> str | None:
        """A sentence on a file that is read as another one than its name says; None for all others.

        Raises DataError for one that is not to be read.
        """
        path = Path(self.name)
        return Sheet.of(path).notice if self.dataset is None and path.suffix.lower() in SUFFIXES else None

    def fingerprint(self) -> str | None:
        """What changes with the content: a file's SHA-256, what `datasets` goes by for its own; None if unknown."""
        if self.dataset is not None:
            return getattr(self.dataset, "_fingerprint", None)
        try:
            return atomic_files.digest_of(Path(self.name))
        except OSError:
            return None


@dataclass(frozen=True)
class Rows:
    """Everything a source held."""

    rows: tuple[RawRow, ...]
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
    rows: list[RawRow] = []
    dropped: list[Dropped] = []
    for item in Source.open(source, split, subset).read(max_rows):
        if isinstance(item, RawRow):
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
