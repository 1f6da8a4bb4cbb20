"""Tokenised rows in flat arrays: four bytes a token, made into an `Example` when one is asked for.

A list of Python ints takes 36 bytes a token. Here rows stand one behind the other in a `Block`; a block that is full
goes to a file, which is mapped in the end, so that memory holds one block however many rows there are, and of each row
its number. Pages of the file that were read are given back after every few thousand rows: they stay in the kernel's
cache where there is room.
"""

import hashlib
import json
import mmap
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, overload

import numpy
from numpy.typing import NDArray

from qtune.cache_dir import VARIABLE
from qtune.data.ragged import Ints
from qtune.data.rows import NOT_TRAINED, Example
from qtune.errors import DiskFull
from qtune.units import GIB, format_bytes

BLOCK_ROWS, BLOCK_TOKENS, BLOCK_TEXT_BYTES = 1 << 17, 1 << 23, 1 << 25  # some 100 MB at the most
MOST_UNWRITTEN_BYTES = GIB  # of blocks in memory where the disk takes no more: a file of some 500 MB
ROWS_BETWEEN = 1 << 10  # that are read before their pages are given back; one page brings 15 along
FILE, ALIGNED_BYTES, LAST_BYTES = "rows.bin", 8, 8
TEXTS = ("place", "prompt_text", "answer", "check")


@dataclass(frozen=True)
class Block:
    """Rows behind one another: of row i what stands up to `*_ends[i]`, from where the row before it ended.

    `ids` are a row's tokens, and those of its prompt where truncation left less of the row than that. `runs` are the
    lengths of its stretches of labels, the first not trained, the second trained, and so on. `digests` are 64 bits of a
    hash of each row's tokens. `text` is UTF-8: the place, the prompt text, the answer and the check of each row.
    """

    ids: Ints
    id_ends: Ints
    tokens: Ints
    rejected_at: Ints
    prompt_tokens: Ints
    trained_tokens: Ints
    cut_tokens: Ints
    runs: Ints
    run_ends: Ints
    digests: NDArray[numpy.uint64]
    text: NDArray[numpy.uint8]
    text_ends: Ints

    def __len__(self) -> int:
        return len(self.tokens)

    def input_ids(self, row: int) -> Ints:
        start = self.id_ends[row - 1] if row else 0
        return self.ids[start : start + self.tokens[row]]

    def labels(self, row: int) -> Ints:
        start = self.run_ends[row - 1] if row else 0
        runs = self.runs[start : self.run_ends[row]]
        trained = numpy.repeat(numpy.arange(len(runs)) % 2 == 1, runs)
        return numpy.where(trained, self.input_ids(row), NOT_TRAINED)

    def example(self, row: int) -> Example:
        start = self.id_ends[row - 1] if row else 0
        place, prompt_text, answer, check = (self._text(len(TEXTS) * row + i) for i in range(len(TEXTS)))
        return Example(
            input_ids=self.input_ids(row).tolist(),
            labels=self.labels(row).tolist(),
            prompt_ids=self.ids[start : start + self.prompt_tokens[row]].tolist(),
            prompt_text=prompt_text,
            answer=answer,
            place=place,
            check=check,
            cut_tokens=int(self.cut_tokens[row]),
            rejected_at=int(self.rejected_at[row]),
        )

    def _text(self, number: int) -> str:
        start = self.text_ends[number - 1] if number else 0
        return self.text[start : self.text_ends[number]].tobytes().decode()


NUMBERS = {column.name: "i" for column in fields(Block)} | {"digests": "Q", "text": "B", "text_ends": "q"}
Index = list[dict[str, int]]  # of each block in a file how long its columns are


class Blocks(Sequence[Block]):
    """Blocks in memory, or in a file that is mapped as `pages`; rows count through all of them."""

    def __init__(self, blocks: Sequence[Block], pages: mmap.mmap | None = None):
        self._blocks, self.pages = tuple(blocks), pages
        self._starts = numpy.cumsum([0, *map(len, self._blocks)])
        self._reads = 0

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, at: int) -> Block:  # type: ignore[override]
        return self._blocks[at]

    @property
    def rows(self) -> int:
        return int(self._starts[-1])

    def holding(self, row: int) -> tuple[Block, int]:
        """The block that a row stands in, and its number there."""
        self._reads += 1
        if self._reads % ROWS_BETWEEN == 0:
            self.give_back()
        number = int(numpy.searchsorted(self._starts, row, side="right")) - 1
        return self._blocks[number], row - int(self._starts[number])

    def column(self, name: str) -> Ints:
        """Of all rows."""
        empty = numpy.zeros(0, NUMBERS[name])
        values: Ints = numpy.concatenate([empty, *(getattr(block, name) for block in self._blocks)])
        self.give_back()
        return values

    def give_back(self) -> None:
        if self.pages is not None and hasattr(mmap, "MADV_DONTNEED"):
            self.pages.madvise(mmap.MADV_DONTNEED)


def append(block: Block, file: BinaryIO) -> dict[str, int]:
    """Write a block's columns, each at a multiple of ALIGNED_BYTES; how long they are. Raises OSError."""
    for values in vars(block).values():
        file.write(values.data)
        file.write(bytes(-values.nbytes % ALIGNED_BYTES))
    file.flush()
    return {name: len(values) for name, values in vars(block).items()}


def append_index(index: Index, file: BinaryIO) -> None:
    """End a file of blocks with their index, and where that begins. Raises OSError."""
    at = file.tell()
    file.write(json.dumps(index).encode())
    file.write(at.to_bytes(LAST_BYTES, "little"))
    file.flush()


def read_index(path: Path) -> Index:
    """Raises OSError, and ValueError for a file that was not ended."""
    with path.open("rb") as file:
        file.seek(-LAST_BYTES, 2)
        until, at = file.tell(), int.from_bytes(file.read(LAST_BYTES), "little")
        file.seek(at)
        index: Index = json.loads(file.read(until - at))
    return index


def map_blocks(path: Path, index: Index) -> Blocks:
    """The blocks of a file, which may be removed meanwhile. Raises OSError and ValueError."""
    if not index:
        return Blocks(())
    with path.open("rb") as file:
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    blocks, at = [], 0
    for lengths in index:
        columns = {}
        for name, length in lengths.items():
            columns[name] = numpy.frombuffer(pages, NUMBERS[name], length, at)
            at += -(-columns[name].nbytes // ALIGNED_BYTES) * ALIGNED_BYTES
        blocks.append(Block(**columns))
    return Blocks(blocks, pages)


class Examples(Sequence[Example]):
    """Rows of `blocks` in the order of `indices`, which count through all of them. A slice is a view.

    `weights` says of each row of the blocks what its trained tokens count for; None where all are alike.
    """

    def __init__(self, blocks: Blocks, indices: Ints | None = None, weights: NDArray[numpy.float32] | None = None):
        self.blocks, self.weights = blocks, weights
        self.indices: Ints = numpy.arange(blocks.rows, dtype=numpy.int32) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, at: int) -> Example: ...
    @overload
    def __getitem__(self, at: slice) -> "Examples": ...
    def __getitem__(self, at: int | slice) -> "Example | Examples":
        if isinstance(at, slice):
            return Examples(self.blocks, self.indices[at], self.weights)
        block, row = self.blocks.holding(int(self.indices[at]))
        return block.example(row)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(self) != len(other):
            return False
        return all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def take(self, positions: Iterable[int] | Ints) -> "Examples":
        """The rows at `positions` of these, in that order."""
        if not isinstance(positions, numpy.ndarray):
            positions = numpy.fromiter(positions, numpy.int64)
        return Examples(self.blocks, self.indices[positions], self.weights)

    def followed_by(self, others: "Examples") -> "Examples":
        """These rows, then `others`, which are of the same blocks."""
        return Examples(self.blocks, numpy.concatenate([self.indices, others.indices]), self.weights)

    def weight(self, at: int) -> float:
        return 1.0 if self.weights is None else float(self.weights[self.indices[at]])

    def arrays(self, at: int) -> tuple[Ints, Ints]:
        """`input_ids` and `labels` of one row, (T,) each."""
        block, row = self.blocks.holding(int(self.indices[at]))
        return block.input_ids(row), block.labels(row)

    def each(self) -> Iterator[tuple[Ints, Ints]]:
        """`arrays` of every row in turn."""
        return map(self.arrays, range(len(self)))

    @cached_property
    def tokens(self) -> Ints:
        """The length of each row."""
        return self._of_each("tokens")

    @cached_property
    def are_pairs(self) -> bool:
        """Whether there is a rejected conversation in every row; if not, there is in none."""
        return len(self) > 0 and self[0].rejected_at > 0

    @property
    def rejected_at(self) -> Ints:
        """`Example.rejected_at` of each row."""
        return self._of_each("rejected_at")

    @cached_property
    def trained_tokens(self) -> Ints:
        """`Example.trained_tokens` of each row."""
        return self._of_each("trained_tokens")

    @property
    def prompt_tokens(self) -> Ints:
        """The length of each row's `Example.prompt_ids`."""
        return self._of_each("prompt_tokens")

    @property
    def cut_tokens(self) -> Ints:
        return self._of_each("cut_tokens")

    @property
    def digests(self) -> Ints:
        """Rows with the same are the same."""
        return self._of_each("digests")

    def _of_each(self, column: str) -> Ints:
        return self.blocks.column(column)[self.indices]


class OpenBlock:
    """A block under construction."""

    def __init__(self) -> None:
        self._values = {name: array(kind) for name, kind in NUMBERS.items()}

    def __len__(self) -> int:
        return len(self._values["tokens"])

    @property
    def is_full(self) -> bool:
        sizes = (len(self), len(self._values["ids"]), len(self._values["text"]))
        return any(size >= most for size, most in zip(sizes, (BLOCK_ROWS, BLOCK_TOKENS, BLOCK_TEXT_BYTES), strict=True))

    def add(self, example: Example) -> None:
        values = self._values
        is_cut_short = len(example.prompt_ids) > len(example.input_ids)
        ids = array("i", example.input_ids)
        values["ids"].extend(array("i", example.prompt_ids) if is_cut_short else ids)  # one begins with the other
        values["id_ends"].append(len(values["ids"]))
        values["tokens"].append(len(example.input_ids))
        values["rejected_at"].append(example.rejected_at)
        values["prompt_tokens"].append(len(example.prompt_ids))
        values["trained_tokens"].append(example.trained_tokens)
        values["cut_tokens"].append(example.cut_tokens)
        values["runs"].extend(_runs(example.labels))
        values["run_ends"].append(len(values["runs"]))
        values["digests"].frombytes(hashlib.blake2b(ids.tobytes(), digest_size=8).digest())
        for name in TEXTS:
            values["text"].frombytes(getattr(example, name).encode())
            values["text_ends"].append(len(values["text"]))

    def closed(self) -> Block:
        """It takes no more."""
        return Block(**{name: numpy.array(values, NUMBERS[name]) for name, values in self._values.items()})


def _runs(labels: Sequence[int]) -> list[int]:
    """Lengths of the stretches of labels that are not trained and trained, in turn; the first may be 0."""
    trained = numpy.array(labels) != NOT_TRAINED
    changes = numpy.flatnonzero(numpy.diff(trained, prepend=False))
    runs: list[int] = numpy.diff(changes, prepend=0, append=len(labels)).tolist()
    return runs


class ExampleWriter:
    """Takes examples one by one, and gives them back as `Examples` whose full blocks stand in a file in `folder`.

    Without a folder, or once it cannot be written, blocks stay in memory.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder
        self._index: Index = []
        self._unwritten: list[Block] = []
        self._open = OpenBlock()
        self._file: BinaryIO | None = None

    def add(self, example: Example) -> None:
        """Raises DiskFull for more than memory should hold where the disk takes no more."""
        self._open.add(example)
        if self._open.is_full:
            self._close()

    def finish(self) -> Examples:
        """All that was added, in order."""
        if len(self._open):
            self._close()
        if self._file is None:
            return Examples(Blocks(self._unwritten))
        with self._file as file:
            if self.folder is not None:
                self._try(lambda: append_index(self._index, file))
            written = map_blocks(Path(file.name), self._index)
        return Examples(Blocks([*written, *self._unwritten], written.pages))

    def _close(self) -> None:
        block, self._open = self._open.closed(), OpenBlock()
        if self.folder is None or not self._try(lambda: self._write(block)):
            self._unwritten.append(block)
            self._refuse_too_much()

    def _write(self, block: Block) -> None:
        assert self.folder is not None
        if self._file is None:
            self._file = (self.folder / FILE).open("xb")
        self._index.append(append(block, self._file))

    def _try(self, write: Callable[[], None]) -> bool:
        """Whether it could be written; where not, the disk is full, or gone, and nothing more is."""
        try:
            write()
        except OSError:
            self.folder = None
            return False
        return True

    def _refuse_too_much(self) -> None:
        held = sum(values.nbytes for block in self._unwritten for values in vars(block).values())
        if held > MOST_UNWRITTEN_BYTES:
            raise DiskFull(
                f"The disk of {VARIABLE} takes no more of the tokenised rows, and memory holds {format_bytes(held)} of"
                f" them. {VARIABLE} may name a folder on another disk; data.max_rows takes fewer rows."
            )
