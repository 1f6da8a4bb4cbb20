"""Where rows come from: files and hub datasets, one or several. Each row remembers its place.

`datasets` takes a second to import and brings pandas along, so it is imported for a dataset and not for a file.
"""

import contextlib
import dataclasses
import glob
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

from qtune import atomic_files, logs
from qtune.data.csv_dialect import SUFFIXES, Sheet
from qtune.data.file_readers import read_file
from qtune.data.rows import Dropped, RawRow
from qtune.data.text_files import COMPRESSED, count_lines, kind_of
from qtune.errors import DataError, MachineError
from qtune.recipe.data_files import files_of, is_pattern
from qtune.recipe.schema import Data

SHOWN_FAULTS = 3
COMPRESSED_TIMES = 4  # text by gzip, zstd and the rest: 3 to 6 times smaller
DOWNLOADED_BYTES = 10**10  # of a hub dataset at the most; the tokens of a larger one are kept alone
TIMEOUT_SECONDS = 10  # for the hub to answer
Tell = Callable[[str, int, int | None], None]  # what is being done, rows done, rows in all where they are known


@dataclass(frozen=True)
class Source:
    """A file, a folder, a pattern of files (absolute paths) or a hub dataset (a name), whose rows can be read again and
    again; `table` is which one of a database.

    `key` is the table of the recipe that names it. `folder` stands before the places of rows where another source has a
    file of the same name.
    """

    name: str
    dataset: Iterable[dict[str, Any]] | None = None
    table: str | None = None
    key: str = "data"
    folder: str = ""

    @classmethod
    def open(cls, name: str, split: str = "train", subset: str | None = None, streaming: str = "auto") -> "Source":
        """Raises DataError and MachineError for a hub dataset that cannot be had; files are looked at when read."""
        if Path(name).is_absolute():
            return cls(name, table=subset)
        return cls(name, _load_dataset(name, split, subset, streaming))

    @classmethod
    def of_train(cls, data: Data) -> "Source":
        assert data.train is not None, "one part of [data]"
        return cls.open(data.train, data.train_split, data.subset, data.streaming)

    @classmethod
    def of_held_out(cls, data: Data) -> "Source | None":
        """None where the held-out rows are some of data.train."""
        return (
            None if data.held_out is None else cls.open(data.held_out, data.held_out_split, data.subset, data.streaming)
        )

    def read(self, max_rows: int | None = None) -> Iterator[RawRow | Dropped]:
        """The rows one by one, `max_rows` of them at the most. Raises DataError for a file that cannot be read."""
        rows = 0
        for item in self._of_files() if self.dataset is None else self._of_dataset(self.dataset):
            if max_rows is not None and rows >= max_rows:
                return
            rows += isinstance(item, RawRow)
            yield item

    def count_rows(self, max_rows: int | None) -> int | None:
        """How many rows `read` gives, where that is soon told, else None; an empty line of a JSONL file counts too."""
        if isinstance(self.dataset, Sized):
            rows = len(self.dataset)
        elif self.files and all(kind_of(path) == ".jsonl" for path in self.files):
            rows = sum(map(count_lines, self.files))
        else:
            return None
        return rows if max_rows is None else min(rows, max_rows)

    def _of_files(self) -> Iterator[RawRow | Dropped]:
        name = Path(self.name)
        paths = self.files if is_pattern(name) else [name]
        for path in paths:
            before = self.folder + self._within(path)
            for item in read_file(path, self.table):
                yield dataclasses.replace(item, place=before + item.place) if before else item

    def _within(self, path: Path) -> str:
        """The folder of a file of a pattern, from where its wildcards begin: `chats/`."""
        parts = Path(self.name).parent.parts
        fixed = next((number for number, part in enumerate(parts) if glob.has_magic(part)), len(parts))
        return "".join(f"{part}/" for part in path.parent.parts[fixed:]) if is_pattern(Path(self.name)) else ""

    def _of_dataset(self, dataset: Iterable[dict[str, Any]]) -> Iterator[RawRow]:
        for number, values in enumerate(dataset, start=1):
            yield RawRow(values, f"{self.name} row {number:,}")

    @cached_property
    def notice(self) -> str | None:
        """A sentence on a file that is read as another one than its name says; None for all others.

        Raises DataError for one that is not to be read.
        """
        sheets = [path for path in self.files if kind_of(path) in SUFFIXES]
        return next((notice for path in sheets if (notice := Sheet.of(path).notice)), None)

    @property
    def told(self) -> str:
        """Its name, behind the setting that names it where it is one of several."""
        return self.name if self.key == "data" else f"{self.key}.train: {self.name}"

    @cached_property
    def fingerprint(self) -> str | None:
        """What changes with the content: a file's SHA-256, what `datasets` goes by for its own; None if unknown."""
        if self.dataset is not None:
            return getattr(self.dataset, "_fingerprint", None)
        try:
            return atomic_files.digest_of_all(self.files) if self.standing else None
        except OSError:
            return None

    @cached_property
    def standing(self) -> tuple[int, ...] | None:
        """What changes when a file is written to, as it was when this was first asked for."""
        return _standing(self.files) if self.dataset is None else None

    @property
    def files(self) -> list[Path]:
        """What is read of it on this machine."""
        return files_of(Path(self.name)) if self.dataset is None else []

    @property
    def bytes(self) -> int:
        """The size of a file, unpacked as far as can be told; 0 for what is no file."""
        sizes = zip(self.files, self.standing[::3], strict=False) if self.standing else ()
        return sum(
            size * (COMPRESSED_TIMES if path.suffix.lower() in {*COMPRESSED, ".parquet"} else 1) for path, size in sizes
        )

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        """Raises DataError where a file that is read within is no longer as it was when its `standing` was noted."""
        before = self.standing
        yield
        if before and _standing(self.files) != before:
            raise DataError(
                f"{self.name}: changed while it was read, so some rows are of one file and some of another. Start again"
                " once nothing writes to it."
            )


@dataclass(frozen=True)
class Part:
    """A source and how its rows are read, as if they were all there are. `name` tells it from the others."""

    name: str
    source: Source
    data: Data
    is_held_out: bool = False


def parts_of(data: Data) -> list[Part]:
    """The sources that are trained on, in the recipe's order, then that of the held-out rows where it is another.

    Raises as `Source.open` does.
    """
    parts = [(dataclasses.replace(Source.of_train(each), key=key), each) for key, each in data.parts.items()]
    files = Counter(name for source, _ in parts for name in {path.name for path in source.files})
    opened = []
    for source, each in parts:
        is_alone = all(files[path.name] == 1 for path in source.files)
        folder = "" if len(parts) == 1 or is_alone else f"{Path(source.name).parent.name}/"
        name = source.name if source.dataset is not None else folder + Path(source.name).name
        opened.append(Part(name, dataclasses.replace(source, folder=folder), each))
    names = Counter(part.name for part in opened)
    for number, part in enumerate(opened):
        if names[part.name] > 1:
            opened[number] = dataclasses.replace(part, name=f"{part.name} ({number + 1})")
    held_out = Source.of_held_out(data)
    return opened if held_out is None else [*opened, Part(Path(held_out.name).name, held_out, data, True)]


def _standing(files: Sequence[Path]) -> tuple[int, ...] | None:
    """Size, time and number of each; None where one is not there."""
    try:
        every = [path.stat() for path in files]
    except OSError:
        return None
    return tuple(number for each in every for number in (each.st_size, each.st_mtime_ns, each.st_ino))


def refuse_bad_rows(first: Sequence[Dropped], rows: int) -> None:
    """Raises DataError naming the `first` of so many bad rows, if there are any."""
    if not rows:
        return
    named = [f"{row.place}: {row.reason}." for row in first[:SHOWN_FAULTS]]
    more = f"{rows - SHOWN_FAULTS:,} more rows like these. " if rows > SHOWN_FAULTS else ""
    raise DataError("\n".join([*named, f'{more}Mend them, or skip them with data.on_bad_row = "drop".']))


@dataclass(frozen=True)
class Streamed:
    """A hub dataset whose rows come over the network each time that it is read; `_fingerprint` is as `datasets` has
    one for what it downloaded."""

    name: str
    rows: Iterable[dict[str, Any]]
    _fingerprint: str

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Raises MachineError where the hub does not give the next row, which `datasets` has asked for many times."""
        try:
            yield from self.rows
        except Exception as fault:
            raise MachineError(
                f"{self.name}: the Hugging Face hub gave no more rows ({type(fault).__name__}: {fault}). Start again,"
                ' or download it first with data.streaming = "never".'
            ) from fault


def _load_dataset(name: str, split: str, subset: str | None, streaming: str) -> Iterable[dict[str, Any]]:
    """The rows of one split: downloaded once and then taken from the cache, or streamed where they are many.

    Raises DataError for a dataset, subset or split that is not there, MachineError where the hub cannot give it.
    """
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    logs.quiet_libraries()
    datasets.disable_progress_bars()
    try:
        if not _answers(name):
            datasets.config.HF_HUB_OFFLINE = True
        elif streaming != "never":
            builder = datasets.load_dataset_builder(name, subset)
            if streaming == "always" or (_bytes_of(builder.info, split) or 0) > DOWNLOADED_BYTES:
                rows = builder.as_streaming_dataset(split)
                return Streamed(name, rows, f"{builder.hash} {builder.config.name} {split}")
        return datasets.load_dataset(name, subset, split=split)
    except (HFValidationError, RepositoryNotFoundError, DatasetNotFoundError):
        raise DataError(
            f"{name}: is no file here, and the Hugging Face hub has no such dataset that you may read. Check the"
            " name, or log in with `hf auth login` for one that is private or gated."
        ) from None
    except ValueError as fault:  # an unknown split or subset; datasets names those there are
        raise DataError(f"{name}: {str(fault).splitlines()[0]}") from None
    except Exception as fault:  # the hub, its client and the network fail in as many ways as there are layers
        raise MachineError(
            f"{name}: is no file here, and the Hugging Face hub cannot give it ({type(fault).__name__}). Download it"
            ' where there is a network, and name the local file: train = "rows.jsonl".'
        ) from None


def _bytes_of(info: Any, split: str) -> int | None:
    """Of one split as `datasets` keeps it on the disk; None where a dataset does not say."""
    of_split = (info.splits or {}).get(split)
    return of_split.num_bytes if of_split and of_split.num_bytes else info.dataset_size or info.download_size


def _answers(name: str) -> bool:
    """Whether the hub does, asked once. Where not, `datasets` is to go to its cache, not through its retries."""
    try:
        HfApi().dataset_info(name, timeout=TIMEOUT_SECONDS)
    except (HFValidationError, RepositoryNotFoundError):
        raise
    except Exception:  # no network, no name service, a proxy, offline mode
        return False
    return True
