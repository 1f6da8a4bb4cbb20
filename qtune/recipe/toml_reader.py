"""The bytes of a recipe become values and their lines, or one sentence on why they are no TOML."""

import json
import os
import re
import tomllib
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtune.errors import RecipeError
from qtune.units import MIB, format_bytes

Key = tuple[str, ...]

MAX_BYTES = 1 * MIB  # the largest recipe; what is bigger is a data file named by mistake

SYNTAX = {  # what tomllib says, and what it means to the writer of a recipe
    "Expected '=' after a key": "a setting is written name = value, and there is no = here",
    "Expected newline or end of document": "something follows the value; a setting has a line of its own",
    "Invalid statement": "this is neither a [table] nor a setting written name = value",
    "Invalid initial character for a key": "the name of a setting is missing, or needs quotes",
    "Expected ']": "the name of a table is not closed with ]",
    "Unclosed array": "a list needs commas between its values and a ] at its end",
    "Unclosed inline table": "a table in braces needs commas between its settings and a } on the same line",
    "Unterminated string": "a text has no closing quote",
    "Illegal character '\\n'": "a text has no closing quote on its line",
    "Found invalid character '\\n'": "a text has no closing quote on its line",
    "Expected \"'": "a text has no closing quote",
    "Unescaped '\\'": r"a backslash is written \\ in double quotes, or as it is in 'single quotes'",
    "Invalid hex value": r"a backslash is written \\ in double quotes, or as it is in 'single quotes'",
    "Invalid date or datetime": "there is no such date",
    "Duplicate inline table key": "a setting is in the braces twice",
    "Cannot ": "a setting is there twice",
}
REPEATED = ("Cannot overwrite", "Cannot declare", "Cannot redefine", "Cannot mutate")
WORDS = {  # of other languages
    "True": "TOML writes true with a small letter",
    "False": "TOML writes false with a small letter",
    "yes": "TOML writes yes as true",
    "on": "TOML writes on as true",
    "no": "TOML writes no as false",
    "off": "TOML writes off as false",
    "None": "TOML has no None: what is unset is left out",
    "null": "TOML has no null: what is unset is left out",
}


MAX_BROKEN = 20  # lines that are read past; a file with more is no recipe with slips in it
HEADER = re.compile(r"\s*\[+\s*([^\]\n#]*?)\s*\]*\s*(#.*)?")
COMMA_DECIMAL = re.compile(r"([^=#]*=\s*[+-]?\d+),(\d+)\s*(?:#.*)?")
NAME = re.compile(r"\s*([A-Za-z0-9_.-]+)")
OVER_LINES = ("Unclosed", "Expected \"'", "Unterminated", "Cannot declare", "Cannot redefine", "Cannot mutate")


@dataclass(frozen=True)
class Broken:
    """A line that is no TOML: what is wrong with it, and the setting that it was meant for, or the table it is in."""

    line: int
    sentence: str
    key: Key


@dataclass(frozen=True)
class Document:
    """What a TOML text says, on which line each name of it stands, and the lines that say nothing."""

    values: dict[str, Any]
    lines: dict[Key, int]
    broken: tuple[Broken, ...] = ()


def read(path: Path) -> Document:
    """The TOML document at `path`, but for lines that are broken by themselves.

    Raises RecipeError with the line of what cannot be read, and all broken lines before it, where the rest of the text
    could mean something else without it.
    """
    text = _decode(path, _read_bytes(path))
    if not text.strip():
        raise RecipeError([f"{path}: is empty. `qtune recipes copy medical NAME.toml` writes one to start from."])
    lines, broken = text.split("\n"), list[Broken]()
    while True:
        try:
            values = tomllib.loads("\n".join(lines))
            if broken and not values:  # another language from end to end
                raise RecipeError([placed(path, broken[0].line, broken[0].sentence)])
            return Document(values, key_lines("\n".join(lines)), tuple(broken))
        except tomllib.TOMLDecodeError as fault:
            number, sentence = _syntax_fault("\n".join(lines), str(fault))
            broken.append(Broken(number, sentence, _key_at(lines, number)))
            if len(broken) == MAX_BROKEN or not _stands_alone(str(fault), lines[number - 1] if number else ""):
                raise RecipeError([placed(path, each.line, each.sentence) for each in broken]) from None
            lines[number - 1] = ""
        except RecursionError:
            raise RecipeError([f"{path}: is no recipe: its lists or tables are nested too deeply."]) from None
        except ValueError:  # the only other one that int() knows: more digits than Python reads
            raise RecipeError([f"{path}: is no recipe: it holds a number of thousands of digits."]) from None


def placed(path: Path | str, line: int, sentence: str) -> str:
    """`my.toml:3: ...`, without the number where it is 0."""
    return f"{path}:{line}: {sentence}" if line else f"{path}: {sentence}"


def _read_bytes(path: Path) -> bytes:
    if os.path.isdir(path):
        raise RecipeError([f"{path}: is a folder. Name the .toml file in it."])
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise RecipeError([f"{path}: there is no such recipe."]) from None
    except (OSError, ValueError) as fault:
        raise RecipeError([f"{path}: cannot be read ({getattr(fault, 'strerror', None) or fault})."]) from None
    if len(content) > MAX_BYTES:
        raise RecipeError([f"{path}: is over {format_bytes(MAX_BYTES)}, and a recipe is a page of TOML."])
    return content


def _decode(path: Path, content: bytes) -> str:
    """UTF-8 text with or without a byte-order mark, its line ends made `\\n`."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise RecipeError([f"{path}: is UTF-16 text. Save it as UTF-8."])
    if b"\0" in content:
        raise RecipeError([f"{path}: is no text file. A recipe is a page of TOML."])
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as fault:
        before = content[: fault.start]
        line, column = before.count(b"\n") + 1, fault.start - before.rfind(b"\n")
        what = f"byte {column} of the line, 0x{content[fault.start]:02x}, is not UTF-8"
        raise RecipeError([f"{path}:{line}: {what}. Save the file as UTF-8."]) from None


def _stands_alone(message: str, line: str) -> bool:
    """Whether all other lines mean the same without this one, of which tomllib says `message`."""
    return bool(line.strip()) and not line.lstrip().startswith(("[", "{")) and not message.startswith(OVER_LINES)


def _key_at(lines: list[str], number: int) -> Key:
    """The setting that a line was meant for: its name, behind that of the last table above it."""
    above = (HEADER.fullmatch(line) for line in reversed(lines[: max(number - 1, 0)]))
    header = next((found[1] for found in above if found), "")
    name = NAME.match(lines[number - 1]) if number else None
    return tuple(part.strip() for part in f"{header}.{name[1] if name else ''}".split(".") if part.strip())


def _syntax_fault(text: str, message: str) -> tuple[int, str]:
    """tomllib's message, whose place is only in its words, as line (0 for none) and sentence with that line in it."""
    found = re.fullmatch(r"(.*) \(at (?:line (\d+), column (\d+)|end of document)\)", message, re.DOTALL)
    if found is None:
        return 0, f"this is not TOML ({message})."
    lines = text.rstrip("\n").split("\n")
    number = min(int(found[2]), len(lines)) if found[2] else len(lines)
    until = "\n".join([*lines[: number - 1], lines[number - 1][: int(found[3]) - 1]]) if found[2] else text
    shown = lines[number - 1].strip()[:80]
    shown = shown if shown.isprintable() else json.dumps(shown, ensure_ascii=False)
    is_open_list = not found[2] and text.rstrip().endswith((",", "["))
    what = _meaning("Unclosed array" if is_open_list else found[1], until, lines[number - 1])
    return number, f"{what}." + (f" The line is: {shown}" if shown else "")


def _meaning(message: str, until: str, line: str) -> str:
    """A clause for tomllib's `message`; `until` is the text up to the fault and `line` the line that holds it."""
    if line.lstrip().startswith("{") and until.strip() in ("", "{"):
        return "this looks like JSON, and a recipe is TOML: settings written name = value under [table] names"
    if message.startswith(REPEATED) and (first := first_use(until)):
        name, where = first
        return f"{'.'.join(name)} is set on line {where} already, and can be set once"
    if message.startswith("Expected newline") and (decimal := COMMA_DECIMAL.fullmatch(line)):
        return f"a number has a point and no comma: {decimal[1].strip()}.{decimal[2]}"
    if message == "Invalid value":
        return _invalid_value(line)
    known = (words for start, words in SYNTAX.items() if message.startswith(start))
    return next(known, f"this is not TOML ({message})")


def _invalid_value(line: str) -> str:
    """What to write in place of the value on this line."""
    name, equals, value = (part.strip() for part in line.partition("="))
    word = value.split("#")[0].strip().strip("\"'“”‘’")
    if not equals or word.startswith(("[", "{")):
        return "a value is not TOML; text needs quotes in a list too"
    if word in WORDS:
        return WORDS[word]
    if not word:
        return f"{name} has no value"
    if word[0] in ".+-0123456789":
        return "the value is no number in TOML; 0.5, 16 and 2e-4 are"
    return f'text needs quotes: {name} = "{word}"'


# On which line each key stands: `tomllib` gives values without places. The text must have passed `tomllib` already, all
# of it or up to where it ends: the scanner relies on it being valid and only follows its structure.

BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
SPACE = re.compile(r"[ \t]*")
KEY_PART = re.compile(r"""[A-Za-z0-9_-]+|"(?:[^"\\\n]|\\.)*"|'[^'\n]*'""")
STRING = re.compile(r'''"""(?:[^\\]|\\.)*?"{3,5}|\'\'\'.*?\'{3,5}|"(?:[^"\\\n]|\\.)*"|'[^'\n]*\'''', re.DOTALL)
SCALAR = re.compile(r"[^,\]}#\n]+")


class Scanner:
    """Walks a text once. `lines` collects the first line of each table, key and array element; `last` is the name and
    the line of the latest statement."""

    def __init__(self, text: str):
        self.text, self.at = text, 0
        self.lines: dict[Key, int] = {}
        self.last: tuple[Key, int] = ((), 0)
        self._elements: dict[Key, int] = {}  # of each array of tables: the number of its latest element
        self._line_starts = [0, *(match.end() for match in re.finditer("\n", text))]

    def scan(self) -> None:
        table: Key = ()
        self._skip(BLANK)
        while self.at < len(self.text):
            start = self.at
            if self.text[start] == "[":
                name = table = self._header()
            else:
                name = self._pair(table)
            self.last = (name, bisect_right(self._line_starts, start))
            self._skip(BLANK)

    def _header(self) -> Key:
        """`[a.b]`, or `[[a.b]]`, whose elements are numbered from 0."""
        start = self.at
        brackets = 2 if self.text.startswith("[[", start) else 1
        self.at += brackets
        *parents, own = self._key()
        self.at += brackets
        name: Key = ()
        for part in parents:
            name = self._latest_element((*name, part))
        name = (*name, own)
        if brackets == 2:
            self._note(name, start)
            self._elements[name] = self._elements.get(name, -1) + 1
        name = self._latest_element(name)
        self._note(name, start)
        return name

    def _latest_element(self, name: Key) -> Key:
        """The table that a name in a header means: of an array of tables, the element begun last."""
        return (*name, str(self._elements[name])) if name in self._elements else name

    def _pair(self, table: Key) -> Key:
        """`a.b = value`."""
        start = self.at
        name = (*table, *self._key())
        self._note(name, start)
        self.at += 1  # the equals sign
        self._skip(SPACE)
        self._value(name)
        return name

    def _key(self) -> Key:
        """Parts joined by dots; leaves the scanner at what ends the key."""
        parts: list[str] = []
        while True:
            self._skip(SPACE)
            part = self._skip(KEY_PART)
            parts.append(tomllib.loads(f"part = {part}")["part"] if part[0] in "\"'" else part)
            self._skip(SPACE)
            if not self.text.startswith(".", self.at):
                return tuple(parts)
            self.at += 1

    def _value(self, name: Key) -> None:
        first = self.text[self.at]
        if first == "[":
            self._array(name)
        elif first == "{":
            self._inline_table(name)
        else:
            self._skip(STRING if first in "\"'" else SCALAR)

    def _array(self, name: Key) -> None:
        self.at += 1
        self._skip(BLANK)
        number = 0
        while not self._is_at("]"):
            element = (*name, str(number))
            self._note(element, self.at)
            self._value(element)
            self._past_comma()
            number += 1
        self.at += 1

    def _inline_table(self, name: Key) -> None:
        self.at += 1
        self._skip(BLANK)
        while not self._is_at("}"):
            self._pair(name)
            self._past_comma()
        self.at += 1

    def _past_comma(self) -> None:
        self._skip(BLANK)
        if self.text.startswith(",", self.at):
            self.at += 1
            self._skip(BLANK)

    def _is_at(self, end: str) -> bool:
        return self.at >= len(self.text) or self.text[self.at] == end

    def _skip(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self.text, self.at)
        assert match is not None, "tomllib accepts nothing else here"
        self.at = match.end()
        return match[0]

    def _note(self, name: Key, at: int) -> None:
        """Remember a name, and the tables that it opens on its way."""
        line = bisect_right(self._line_starts, at)
        for length in range(1, len(name) + 1):
            self.lines.setdefault(name[:length], line)


def key_lines(text: str) -> dict[Key, int]:
    """The line of every key of a valid TOML text, by its full name; array elements count from `"0"`."""
    scanner = Scanner(text)
    scanner.scan()
    return scanner.lines


def first_use(text: str) -> tuple[Key, int] | None:
    """For a text whose last statement repeats a name: as much of that name as was there before, and on which line."""
    scanner = Scanner(text)
    scanner.scan()
    name, line = scanner.last
    earlier = (name[:length] for length in range(len(name), 0, -1) if scanner.lines[name[:length]] < line)
    found = next(earlier, None)
    return (found, scanner.lines[found]) if found else None
