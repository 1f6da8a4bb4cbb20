"""The places of very many rows, eight bytes each."""

import re
from array import array
from bisect import bisect_right

NUMBERED = re.compile(r"(.*(?::| row ))([\d,]+)", re.DOTALL)


class Places:
    """Takes `rows.jsonl:17` and `rows.parquet row 17` one by one, and gives them back by number."""

    def __init__(self) -> None:
        self._numbers = array("Q")
        self._stems: list[str] = []
        self._starts: list[int] = []

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, row: int) -> str:
        stem = self._stems[bisect_right(self._starts, row) - 1]
        return f"{stem}{self._numbers[row]:,}"

    def add(self, place: str) -> None:
        stem, number = parted(place)
        if not self._stems or self._stems[-1] != stem:
            self._stems.append(stem)
            self._starts.append(len(self._numbers))
        self._numbers.append(number)


def parted(place: str) -> tuple[str, int]:
    """`rows.jsonl:` and 1017 of `rows.jsonl:1,017`."""
    numbered = NUMBERED.fullmatch(place)
    assert numbered is not None, f"a place ends in a number: {place!r}"
    return numbered[1], int(numbered[2].replace(",", ""))
