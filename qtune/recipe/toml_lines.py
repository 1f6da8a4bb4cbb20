"""On which line of a TOML text each key stands; `tomllib` gives values without places.

The text must have passed `tomllib` already, all of it or up to where it ends: the scanner relies on it being valid and
only follows its structure.
"""

import re
import tomllib
from bisect import bisect_right

Key = tuple[str, ...]

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
