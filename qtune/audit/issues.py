"""What a check found: places, gathered by the kind of fault while rows stream by."""

from dataclasses import dataclass, field
from typing import Literal

Level = Literal["fault", "warning"]

MOST_PLACES = 10_000  # of one kind; a file with a fault in every row must not fill the memory with their places


@dataclass(frozen=True)
class Place:
    """One row, `rows.jsonl:17`, and what is the matter there; `told` is a clause."""

    place: str
    told: str


@dataclass(frozen=True)
class Issue:
    """One kind of fault: how many rows have it, the first MOST_PLACES of them, and what would work.

    `code` is its short name, `sentence` says what it means, `advice` what to do.
    """

    code: str
    level: Level
    rows: int
    sentence: str
    advice: str
    places: tuple[Place, ...]


@dataclass
class Group:
    """The rows of one kind so far."""

    rows: int = 0
    places: list[Place] = field(default_factory=list)

    def add(self, place: str, told: str) -> None:
        self.rows += 1
        if len(self.places) < MOST_PLACES:
            self.places.append(Place(place, told))


@dataclass
class Groups:
    """Every kind so far, by its code."""

    by_code: dict[str, Group] = field(default_factory=dict)

    def add(self, code: str, place: str, told: str) -> None:
        self.by_code.setdefault(code, Group()).add(place, told)

    def rows(self, *codes: str) -> int:
        """How many times a row was put under one of `codes`."""
        return sum(self.by_code[code].rows for code in codes if code in self.by_code)
