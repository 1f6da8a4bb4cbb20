"""Text in the wrong encoding: files that are not UTF-8, and texts that once were read as what they are not."""

import codecs
import contextlib
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import charset_normalizer
import ftfy
from ftfy.badness import is_bad

from qtune.data.text_files import open_bytes, unpacked_name

WESTERN = "cp1252"
IN_USE = [  # what programs write that do not write UTF-8; guessed among all there are, German is a DOS of the Baltic
    *(WESTERN, "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257", "koi8_r"),
    *("gb18030", "big5", "cp932", "euc_jp", "cp949"),
]
LETTER = "[A-Za-zÀ-ÖØ-öø-ÿŒœŸŠšŽž]"
# What text of the west seldom has and other code pages have as letters: a sign amid a word, õ but in õe, and ð, þ, ý.
NOT_WESTERN = re.compile(f"{LETTER}[¡-¶¸-¿×÷]{LETTER}|[Õõ](?![Ee])|[ÐÝÞðýþ]")
WORDS = re.compile(r"[^\W\d_]{2,}")
TEXT_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".md")
SAMPLE_BYTES = 1 << 16
EXCERPT_CHARACTERS = 24
NOT_ASCII = re.compile(r"[^\x00-\x7f]{3,}")
LOST_TWICE = "锟斤拷"  # two U+FFFD in UTF-8, read as GBK


@dataclass(frozen=True)
class FileEncoding:
    """How a text file is written. `bad_lines` are those that are not UTF-8, `probably` what they seem to be instead."""

    lines: int
    has_bom: bool
    bad_lines: tuple[int, ...]
    probably: str | None


def encoding_of(path: Path) -> FileEncoding:
    """Reads the whole file, a line at a time. Raises OSError."""
    bad: list[int] = []
    sample = bytearray()
    number = 0
    has_bom = False
    with open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            has_bom = has_bom or (number == 1 and line.startswith(codecs.BOM_UTF8))
            if not line.isascii() and not is_utf8(line):
                bad.append(number)
                sample += line[: SAMPLE_BYTES - len(sample)]
    return FileEncoding(number, has_bom, tuple(bad), _guess(bytes(sample)) if bad else None)


def is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def _guess(sample: bytes) -> str | None:
    guesses = charset_normalizer.from_bytes(sample, cp_isolation=IN_USE)
    best = guesses.best()
    if best is None:
        return None
    equals = [str(match) for match in guesses if match.chaos == best.chaos]
    return WESTERN if _reads_as_western(sample, equals) else best.encoding


def _reads_as_western(sample: bytes, texts: Sequence[str]) -> bool:
    """Whether cp1252 gives one of the likeliest `texts`, and that has few accents and none of NOT_WESTERN."""
    try:
        text = sample.decode(WESTERN)
    except UnicodeDecodeError:
        return False
    accented = [word for word in WORDS.findall(text) if not word.isascii()]
    strange = [word for word in accented if 2 * sum(letter > "\x7f" for letter in word) > len(word)]
    return text in texts and NOT_WESTERN.search(text) is None and 2 * len(strange) <= len(accented)


def called(encoding: str | None) -> str:
    """`probably GB18030`, as a person would write it."""
    return f"probably {encoding.replace('_', '-').upper()}" if encoding else "in no encoding that can be told"


@contextlib.contextmanager
def as_utf8(path: Path, written: FileEncoding) -> Iterator[Path]:
    """A copy of the file, unpacked, whose bad lines are decoded as what they probably are, for as long as the context
    lasts; `path` itself where no line is bad."""
    if not written.bad_lines:
        yield path
        return
    folder = tempfile.mkdtemp(prefix="qtune-check-")
    try:
        copy = Path(folder, unpacked_name(path))
        with open_bytes(path) as source, copy.open("wb") as target:
            for line in source:
                target.write(line if is_utf8(line) else line.decode(written.probably or "utf-8", "replace").encode())
        yield copy
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def lost_characters(text: str) -> str | None:
    """The first U+FFFD with what stands around it: a character that some program could not read."""
    at = text.find("\ufffd")
    return None if at < 0 else _around(text, at)


def mojibake(text: str) -> str | None:
    """The first text that was written in one encoding and read in another, and what it was: `cafÃ© for café`."""
    if text.isascii():
        return None
    if LOST_TWICE in text:
        return f"{LOST_TWICE}, characters lost between UTF-8 and GBK"
    if is_bad(text):
        for word in text.split():
            mended = word if word.isascii() else ftfy.fix_encoding(word)
            if mended != word:
                return f"{word[:EXCERPT_CHARACTERS]} for {mended[:EXCERPT_CHARACTERS]}"
    return next(filter(None, map(_utf8_read_as_gbk, NOT_ASCII.findall(text))), None)


def _utf8_read_as_gbk(run: str) -> str | None:
    """Chinese that is valid UTF-8 once encoded as GBK was UTF-8; by chance that is next to impossible."""
    try:
        meant = run.encode("gb18030").decode()
    except UnicodeError:
        return None
    return f"{run[:EXCERPT_CHARACTERS]} for {meant[:EXCERPT_CHARACTERS]}"


def _around(text: str, at: int) -> str:
    half = EXCERPT_CHARACTERS // 2
    return text[max(0, at - half) : at + half]
