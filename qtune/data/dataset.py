"""Tokenised rows in flat arrays: four bytes a token, made into an `Example` when one is asked for.

A list of Python ints takes 36 bytes a token. Here rows stand one behind the other in a `Block`; a block that is full
goes to a file and is mapped back, so that memory holds one block however many rows there are.
"""

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from qtune.data.rows import NOT_TRAINED, Example

BLOCK_ROWS, BLOCK_TOKENS, BLOCK_TEXT_BYTES = 1 << 17, 1 << 23, 1 << 25  # some 100 MB at the most
TEXTS = ("place", "prompt_text", "answer", "check")
Ints = NDArray[numpy.integer[Any]]


@dataclass(frozen=True)
class Block:
    """Rows behind one another: of row i what stands up to `*_ends[i]`, from where the row before it ended.

    `ids` are a row's tokens, and those of its prompt where truncation left less of the row than that. `runs` are the
    lengths of its stretches of labels, the first not trained, the second trained, and so on. `text` is UTF-8: the
    place, the prompt text, the answer and the check of each row.
    """

    ids: Ints
    id_ends: Ints
    tokens: Ints
    prompt_tokens: Ints
    trained_tokens: Ints
    cut_tokens: Ints
    runs: Ints
    run_ends: Ints
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
        )

    def _text(self, number: int) -> str:
        start = self.text_ends[number - 1] if number else 0
        return self.text[start : self.text_ends[number]].tobytes().decode()


def save_block(block: Block, path: Path) -> None:
    save_file({name: torch.from_numpy(values) for name, values in vars(block).items()}, path)


def block_files(folder: Path) -> list[Path]:
    """The blocks in a folder, in order."""
    return sorted(folder.glob("rows-*.safetensors"))


def map_block(path: Path) -> Block:
    """The block in a file, mapped: pages are read when they are used, and given back when memory is short."""
    with safe_open(path, "pt") as file:
        return Block(**{column.name: file.get_tensor(column.name).numpy() for column in fields(Block)})


class Examples(Sequence[Example]):
    """Rows of `blocks` in the order of `indices`, which count through all of them. A slice is a view."""

    def __init__(self, blocks: Sequence[Block], indices: Ints | None = None):
        self.blocks = tuple(blocks)
        self._starts = numpy.cumsum([0, *map(len, self.blocks)])
        self.indices: Ints = numpy.arange(self._starts[-1]) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, at: int) -> Example: ...
    @overload
    def __getitem__(self, at: slice) -> "Examples": ...
    def __getitem__(self, at: int | slice) -> "Example | Examples":
        if isinstance(at, slice):
            return self.take(range(len(self))[at])
        block, row = self._stands(at)
        return block.example(row)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(self) != len(other):
            return False
        return all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def take(self, positions: Iterable[int]) -> "Examples":
        """The rows at `positions` of these, in that order."""
        return Examples(self.blocks, self.indices[numpy.fromiter(positions, numpy.int64)])

    def followed_by(self, others: "Examples") -> "Examples":
        """These rows, then `others`, which are of the same blocks."""
        return Examples(self.blocks, numpy.concatenate([self.indices, others.indices]))

    def arrays(self, at: int) -> tuple[Ints, Ints]:
        """`input_ids` and `labels` of one row, (T,) each."""
        block, row = self._stands(at)
        return block.input_ids(row), block.labels(row)

    def each(self) -> Iterator[tuple[Ints, Ints]]:
        """`arrays` of every row in turn."""
        return map(self.arrays, range(len(self)))

    @cached_property
    def tokens(self) -> Ints:
        """The length of each row."""
        return self._of_each("tokens")

    @cached_property
    def trained_tokens(self) -> Ints:
        """`Example.trained_tokens` of each row."""
        return self._of_each("trained_tokens")

    @cached_property
    def cut_tokens(self) -> Ints:
        return self._of_each("cut_tokens")

    @cached_property
    def digests(self) -> NDArray[numpy.uint64]:
        """64 bits of a hash of each row's ids: rows with the same are the same."""
        hashed = (hashlib.blake2b(ids.tobytes(), digest_size=8).digest() for ids, _ in self.each())
        return numpy.frombuffer(b"".join(hashed), numpy.uint64)

    def _of_each(self, column: str) -> Ints:
        if not self.blocks:
            return numpy.zeros(0, numpy.int32)
        return numpy.concatenate([getattr(block, column) for block in self.blocks])[self.indices]

    def _stands(self, at: int) -> tuple[Block, int]:
        index = int(self.indices[at])
        number = int(numpy.searchsorted(self._starts, index, side="right")) - 1
        return self.blocks[number], index - int(self._starts[number])


class OpenBlock:
    """A block under construction."""

    def __init__(self) -> None:
        self._values = {column.name: array("q") for column in fields(Block)}
        self._values |= {"ids": array("i"), "runs": array("i")}
        self._text = bytearray()

    def __len__(self) -> int:
        return len(self._values["tokens"])

    @property
    def is_full(self) -> bool:
        sizes = (len(self), len(self._values["ids"]), len(self._text))
        return any(size >= most for size, most in zip(sizes, (BLOCK_ROWS, BLOCK_TOKENS, BLOCK_TEXT_BYTES), strict=True))

    def add(self, example: Example) -> None:
        values = self._values
        is_cut_short = len(example.prompt_ids) > len(example.input_ids)
        values["ids"].extend(example.prompt_ids if is_cut_short else example.input_ids)  # one begins with the other
        values["id_ends"].append(len(values["ids"]))
        values["tokens"].append(len(example.input_ids))
        values["prompt_tokens"].append(len(example.prompt_ids))
        values["trained_tokens"].append(example.trained_tokens)
        values["cut_tokens"].append(example.cut_tokens)
        values["runs"].extend(_runs(example.labels))
        values["run_ends"].append(len(values["runs"]))
        for name in TEXTS:
            self._text += getattr(example, name).encode()
            values["text_ends"].append(len(self._text))

    def closed(self) -> Block:
        arrays = {name: numpy.array(values) for name, values in self._values.items()}
        return Block(**arrays | {"text": numpy.array(self._text, numpy.uint8)})


def _runs(labels: Sequence[int]) -> list[int]:
    """Lengths of the stretches of labels that are not trained and trained, in turn; the first may be 0."""
    trained = numpy.array(labels) != NOT_TRAINED
    changes = numpy.flatnonzero(numpy.diff(trained, prepend=False))
    runs: list[int] = numpy.diff(changes, prepend=0, append=len(labels)).tolist()
    return runs


class ExampleWriter:
    """Takes examples one by one, and gives them back as `Examples` whose full blocks stand in `folder`.

    Without a folder, or once it cannot be written, blocks stay in memory.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder
        self._blocks: list[Block] = []
        self._open = OpenBlock()

    def add(self, example: Example) -> None:
        self._open.add(example)
        if self._open.is_full:
            self._close()

    def finish(self) -> Examples:
        """All that was added, in order."""
        if len(self._open):
            self._close()
        return Examples(self._blocks)

    def _close(self) -> None:
        block, self._open = self._open.closed(), OpenBlock()
        if self.folder is not None:
            path = self.folder / f"rows-{len(self._blocks):05}.safetensors"
            try:
                save_block(block, path)
                block = map_block(path)
            except (SafetensorError, OSError):  # the disk is full, or gone
                self.folder = None
        self._blocks.append(block)
