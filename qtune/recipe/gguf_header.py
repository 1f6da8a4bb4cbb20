"""What a GGUF file says of itself: the texts at its head, without the rest of a file of gigabytes.

The layout is that of ggml's docs/gguf.md: magic, version, two counts, then pairs of key and typed value.
"""

import struct
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

HEAD_BYTES = 1 << 16  # the general.* keys come first; behind them is the vocabulary, which is megabytes
MAGIC, STRING, ARRAY = b"GGUF", 8, 9
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value, by its type


def texts(path: Path) -> dict[str, str]:
    """The values at the head of the file that are texts, by key; nothing for a file that is no GGUF."""
    try:
        with path.open("rb") as file:
            head = BytesIO(file.read(HEAD_BYTES))
    except OSError:
        return {}
    return dict(_texts(head)) if head.read(len(MAGIC)) == MAGIC else {}


def _texts(head: BytesIO) -> Iterator[tuple[str, str]]:
    """Up to where the head ends, or holds what is no value."""
    try:
        _, _, pairs = struct.unpack("<IQQ", head.read(20))
        for _ in range(pairs):
            key, kind = _text(head), _number(head, 4)
            if kind == STRING:
                yield key, _text(head)
            else:
                _skip(head, kind)
    except (struct.error, KeyError, UnicodeDecodeError, OverflowError):
        return


def _number(head: BytesIO, size: int) -> int:
    return int(struct.unpack("<I" if size == 4 else "<Q", head.read(size))[0])


def _text(head: BytesIO) -> str:
    length = _number(head, 8)
    content = head.read(length)
    if len(content) < length:
        raise struct.error("the head ends here")
    return content.decode()


def _skip(head: BytesIO, kind: int) -> None:
    if kind != ARRAY:
        head.read(SIZES[kind])
        return
    inner, count = _number(head, 4), _number(head, 8)
    if inner == STRING:
        for _ in range(count):
            _text(head)
    else:
        head.read(SIZES[inner] * count)
