"""Files of text, a block or a line at a time; UTF-8 unless another encoding is named."""

import codecs
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from qtune.errors import DataError

BLOCK_BYTES = 1 << 20


class FileFault(DataError):
    """A file that cannot be read: which, in what line where it is one's, and `told`, a sentence without its subject."""

    def __init__(self, path: Path, told: str, line: int | None = None):
        self.path, self.told, self.line = path, told, line
        super().__init__(f"{path}: {told}" if line is None else f"{path}:{line:,}: {told}")


def refuse_bad_bytes(path: Path) -> None:
    """Raises FileFault for a byte that is not UTF-8, by its line, before any row is read."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    newlines = 0
    for block in chain(blocks_of(path), [b""]):
        held, _ = decoder.getstate()  # the start of a character that the block before ended in
        try:
            decoder.decode(block, final=not block)
        except UnicodeDecodeError as fault:
            line = newlines + (held + block).count(b"\n", 0, fault.start) + 1
            bad_byte = fault.object[fault.start]
            raise FileFault(path, f"byte 0x{bad_byte:02x} is not UTF-8 text. Save the file as UTF-8.", line) from None
        newlines += block.count(b"\n")


def blocks_of(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            yield block


def count_lines(path: Path) -> int:
    """How many lines there are, the last with an end or without."""
    newlines, last = 0, b"\n"
    for block in blocks_of(path):
        newlines, last = newlines + block.count(b"\n"), block[-1:]
    return newlines + (last != b"\n")


def lines_of(path: Path, newline: str | None = "\n", encoding: str = "utf-8-sig") -> Iterator[str]:
    """The lines of a file without their ends, a byte-order mark left out; `newline` is as in `open`."""
    with path.open(encoding=encoding, newline=newline) as file:
        for line in file:
            yield line.removesuffix("\n")


def start_of(path: Path, encoding: str = "utf-8-sig") -> tuple[str, bool]:
    """The file's first block of text, and whether that is all of it."""
    with path.open("rb") as file:
        block, more = file.read(BLOCK_BYTES), file.read(1)
    return codecs.getincrementaldecoder(encoding)().decode(block, final=not more), not more
