"""On which line of a TOML text each key stands; `tomllib` gives values without places.

The text must have passed `tomllib` already: the scanner relies on it being valid and only follows its structure.
"""

import re

Key = tuple[str, ...]

BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
SPACE = re.compile(r"[ \t]*")
KEY_PART = re.compile(r"""(?P<bare>[A-Za-z0-9_-]+)|"(?P<basic>(?:[^"\\\n]|\\.)*)"|'(?P<literal>[^'\n]*)'""")
STRING = re.compile(r'''"""(?:[^\\]|\\.)*?"{3,5}|\'\'\'.*?\'{3,5}|"(?:[^"\\\n]|\\.)*"|'[^'\n]*\'''', re.DOTALL)
SCALAR = re.compile(r"[^,\]}#\n]+")


class Scanner:
    """Walks a text once; `lines` collects the first line of each table, dotted key and inline key."""

    def __init__(self, text: str):
        self.text, self.at, self.lines = text, 0, dict[Key, int]()
        self.counts: dict[Key, int] = {}

    def scan(self) -> dict[Key, int]:
        table: Key = ()
        self._skip(BLANK)
        while self.at < len(self.text):
            if self.text[self.at] == "[":
                table = self._header()
            else:
                self._pair(table)
            self._skip(BLANK)
        return self.lines

    def _header(self) -> Key:
        """`[a.b]`, or `[[a.b]]`, whose elements are numbered from 0."""
        is_array = self.text.startswith("[[", self.at)
        start, self.at = self.at, self.at + (2 if is_array else 1)
        name = self._key()
        self.at += 2 if is_array else 1
        if is_array:
            number = self.counts[name] = self.counts.get(name, -1) + 1
            name = (*name, str(number))
        self._note(name, start)
        return name

    def _pair(self, table: Key) -> None:
        """`a.b = value`."""
        start = self.at
        name = (*table, *self._key())
        for length in range(len(table) + 1, len(name) + 1):
            self._note(name[:length], start)
        self.at += 1  # the equals sign
        self._skip(SPACE)
        self._value(name)

    def _key(self) -> Key:
        """Parts joined by dots; leaves the scanner at what ends the key."""
        parts: list[str] = []
        while True:
            self._skip(SPACE)
            match = KEY_PART.match(self.text, self.at)
            assert match is not None, "tomllib accepts no other key"
            parts.append(next(group for group in match.groups() if group is not None))
            self.at = match.end()
            self._skip(SPACE)
            if not self.text.startswith(".", self.at):
                return tuple(parts)
            self.at += 1

    def _value(self, name: Key) -> None:
        if self.text[self.at] == "[":
            self._sequence(name, "]")
        elif self.text[self.at] == "{":
            self._sequence(name, "}")
        elif self.text[self.at] in "\"'":
            self._skip(STRING)
        else:
            self._skip(SCALAR)

    def _sequence(self, name: Key, end: str) -> None:
        """An array or an inline table."""
        self.at += 1
        number = 0
        self._skip(BLANK)
        while self.text[self.at] != end:
            if end == "}":
                self._pair(name)
            else:
                self._note((*name, str(number)), self.at)
                self._value((*name, str(number)))
                number += 1
            self._skip(BLANK)
            if self.text[self.at] == ",":
                self.at += 1
                self._skip(BLANK)
        self.at += 1

    def _skip(self, pattern: re.Pattern[str]) -> None:
        match = pattern.match(self.text, self.at)
        assert match is not None, "tomllib accepts no other value"
        self.at = match.end()

    def _note(self, name: Key, at: int) -> None:
        self.lines.setdefault(name, self.text.count("\n", 0, at) + 1)


def key_lines(text: str) -> dict[Key, int]:
    """The line of every key of a valid TOML text, by its full name; array elements count from `"0"`."""
    return Scanner(text).scan()
