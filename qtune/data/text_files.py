"""Files of text, a block or a line at a time; UTF-8 unless another encoding is named.

A file whose name ends in .gz, .xz, .bz2 or .zst is read as what is in it, and unpacked as it is read: once for each
time that it is gone through, and never onto the disk.
"""

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow

from qtune.errors import DataError

BLOCK_BYTES = 1 << 20
ZSTD_MAGIC, ZSTD_ONE_BYTE = b"\x28\xb5\x2f\xfd", 1  # the kind of block that repeats a byte


def _open_zstd(path: Path) -> BinaryIO:
    """With pyarrow, which `datasets` brings along: Python has zstd from 3.14 on."""
    _refuse_cut_zstd(path)
    return cast(BinaryIO, pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"))


def _refuse_cut_zstd(path: Path) -> None:
    """Raises EOFError for a file that ends within a frame (RFC 8878): pyarrow takes what is there for all."""
    size = path.stat().st_size
    with path.open("rb") as file:
        while start := file.read(8):
            if len(start) < 8:
                raise EOFError("it ends within a frame")
            if start[:4] == ZSTD_MAGIC:
                file.seek(_zstd_header_bytes(start[4]) - 4, io.SEEK_CUR)
                _skip_zstd_blocks(file)
                file.seek(4 if start[4] & 4 else 0, io.SEEK_CUR)  # its checksum
            else:  # a frame to be skipped, or nothing that pyarrow would take
                file.seek(int.from_bytes(start[4:], "little"), io.SEEK_CUR)
            if file.tell() > size:
                raise EOFError("it ends within a frame")


def _zstd_header_bytes(descriptor: int) -> int:
    """Of a frame's header behind its magic number."""
    is_one_segment, content_flag = descriptor >> 5 & 1, descriptor >> 6
    content_bytes = 1 << content_flag if content_flag else is_one_segment
    return 1 + (not is_one_segment) + (0, 1, 2, 4)[descriptor & 3] + content_bytes


def _skip_zstd_blocks(file: BinaryIO) -> None:
    is_last = False
    while not is_last:
        header = file.read(3)
        if len(header) < 3:
            raise EOFError("it ends within a frame")
        bits = int.from_bytes(header, "little")
        is_last, kind, size = bool(bits & 1), bits >> 1 & 3, bits >> 3
        file.seek(1 if kind == ZSTD_ONE_BYTE else size, io.SEEK_CUR)


COMPRESSED: dict[str, Callable[[Path], BinaryIO]] = {
    ".gz": lambda path: cast(BinaryIO, gzip.GzipFile(path)),
    ".xz": lambda path: cast(BinaryIO, lzma.LZMAFile(path)),  # noqa: SIM115, who asks closes it
    ".bz2": lambda path: cast(BinaryIO, bz2.BZ2File(path)),
    ".zst": _open_zstd,
}


class FileFault(DataError):
    """A file that cannot be read: which, in what line where it is one's, and `told`, a sentence without its subject."""

    def __init__(self, path: Path, told: str, line: int | None = None):
        self.path, self.told, self.line = path, told, line
        super().__init__(f"{path}: {told}" if line is None else f"{path}:{line:,}: {told}")


class Unpacked(io.RawIOBase):
    """What is in a compressed file. Raises FileFault where it is cut short or none."""

    def __init__(self, path: Path):
        self.path = path
        with self._refusing_what_is_not_whole():
            self._file = COMPRESSED[path.suffix.lower()](path)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        with self._refusing_what_is_not_whole():
            block = self._file.read(len(buffer))
        buffer[: len(block)] = block
        return len(block)

    def close(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()
        super().close()

    @contextlib.contextmanager
    def _refusing_what_is_not_whole(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except (EOFError, OSError, lzma.LZMAError, zlib.error) as fault:
            told = f"is no whole {self.path.suffix} file ({str(fault).splitlines()[0].rstrip('.')})."
            raise FileFault(self.path, told) from None


def open_bytes(path: Path) -> BinaryIO:
    """The bytes of a file, or of what is in a compressed one."""
    if path.suffix.lower() not in COMPRESSED:
        return path.open("rb")
    return cast(BinaryIO, io.BufferedReader(Unpacked(path), BLOCK_BYTES))


def unpacked_name(path: Path) -> str:
    """`rows.jsonl` of `rows.jsonl.gz`, and of itself."""
    return path.stem if path.suffix.lower() in COMPRESSED else path.name


def kind_of(path: Path) -> str:
    """`.jsonl` of `rows.JSONL`, and of `rows.jsonl.gz`."""
    return Path(unpacked_name(path)).suffix.lower()


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
    with open_bytes(path) as file:
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
    with io.TextIOWrapper(open_bytes(path), encoding, newline=newline) as file:
        for line in file:
            yield line.removesuffix("\n")


def start_of(path: Path, encoding: str = "utf-8-sig") -> tuple[str, bool]:
    """The file's first block of text, and whether that is all of it."""
    with open_bytes(path) as file:
        block, more = file.read(BLOCK_BYTES), file.read(1)
    return codecs.getincrementaldecoder(encoding)().decode(block, final=not more), not more
