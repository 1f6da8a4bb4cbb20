"""How a CSV or TSV file is written: what parts its columns, and in which encoding.

Excel parts columns with semicolons where a comma is the decimal mark, and writes "CSV" in the code page of its Windows,
which in the west of Europe and in America is cp1252. Both are read as they are. Another code page is refused by its
name, as a wrong guess among them would be trained on; and what was guessed is told.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qtune.data.encodings import WESTERN, called, encoding_of, is_utf8
from qtune.data.text_files import FileFault, kind_of, open_bytes, refuse_bad_bytes, start_of

SUFFIXES = {".csv": ",", ".tsv": "\t"}
PARTED_BY = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
LOOKED_AT_RECORDS = 20  # a cell with a comma in it is met by then, and a page of text is read in no time
EXCERPT_CHARACTERS = 24


@dataclass(frozen=True)
class Sheet:
    """`encoding` and `delimiter` as Python's csv takes them; `notice` is a sentence where they are not the usual."""

    encoding: str
    delimiter: str
    notice: str | None

    @classmethod
    def of(cls, path: Path) -> "Sheet":
        """Raises FileFault for a file that is neither UTF-8 nor cp1252."""
        encoding, guessed = _encoding(path)
        usual = SUFFIXES[kind_of(path)]
        delimiter = _delimiter(start_of(path, encoding)[0], usual)
        told = [guessed] if guessed else []
        if delimiter != usual:
            told.append(f"its columns are parted by {PARTED_BY[delimiter]}")
        return cls(encoding, delimiter, f"{path.name}: {', and '.join(told)}." if told else None)


def _encoding(path: Path) -> tuple[str, str | None]:
    """The encoding, and how it was guessed where it is not UTF-8."""
    try:
        refuse_bad_bytes(path)
    except FileFault:
        written = encoding_of(path)
        bad = written.bad_lines[0]
        if written.probably != WESTERN:
            raise _not_utf8(path, bad, called(written.probably)) from None
        word = _excerpt(path, bad)
        return WESTERN, f"is no UTF-8 and read as {WESTERN}, which Excel writes ({word} in line {bad:,})"
    return "utf-8-sig", None


def _excerpt(path: Path, bad: int) -> str:
    """A word by which the guess of cp1252 can be judged, from the line `bad`.

    Raises FileFault where a line is none of it after all, or UTF-8 among lines that are not.
    """
    word = ""
    with open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            if line.isascii():
                continue
            if is_utf8(line):
                raise _not_utf8(path, bad, f"probably {WESTERN.upper()}, and line {number:,} is UTF-8")
            try:
                text = line.decode(WESTERN)
            except UnicodeDecodeError:
                seems = f"in another encoding than the rest, which seems to be {WESTERN.upper()}"
                raise _not_utf8(path, number, seems) from None
            word = word or next((word for word in text.split() if not word.isascii()), "")
    return word[:EXCERPT_CHARACTERS] or "a hard space"


def _not_utf8(path: Path, line: int, seems: str) -> FileFault:
    told = f'is not UTF-8 but {seems}. Save the file as UTF-8; Excel calls that "CSV UTF-8".'
    return FileFault(path, told, line)


def _delimiter(start: str, usual: str) -> str:
    """What gives every record as many cells as the header, more than one; the usual one where several do, or none."""
    cells = {delimiter: _cells(start, delimiter) for delimiter in (usual, *PARTED_BY)}
    even = [delimiter for delimiter, counts in cells.items() if counts and counts[0] > 1 and len(set(counts)) == 1]
    wide = [delimiter for delimiter, counts in cells.items() if counts and counts[0] > 1]
    return next(iter(even or wide), usual)


def _cells(start: str, delimiter: str) -> Sequence[int]:
    """How many cells the first records have; the last one may be cut, and is left out where there are others."""
    counts = []
    try:
        for record in csv.reader(io.StringIO(start, newline=None), delimiter=delimiter, strict=True):
            if any(record):
                counts.append(len(record))
            if len(counts) > LOOKED_AT_RECORDS:
                break
    except csv.Error:
        pass
    return counts[:-1] or counts
