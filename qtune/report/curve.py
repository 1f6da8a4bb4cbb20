"""A line chart in braille characters: eight dots a cell, so a small panel holds a real curve."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from rich.text import Text

Point = tuple[float, float]

# Unicode's numbering of the eight dots of a braille cell, by column and row from the top left.
DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
BLANK = 0x2800
SMOOTHING = 0.9


@dataclass(frozen=True)
class Scale:
    """Maps steps 0..`last` and values `low`..`high` to dots of a canvas of `columns` x `rows` cells."""

    last: float
    low: float
    high: float
    columns: int
    rows: int

    def dot(self, point: Point) -> tuple[int, int]:
        """Dot column from the left and dot row from the top; outside values stick to the edge."""
        x = point[0] / max(self.last, 1)
        y = (point[1] - self.low) / max(self.high - self.low, 1e-12)
        column = round(min(max(x, 0), 1) * (2 * self.columns - 1))
        row = round((1 - min(max(y, 0), 1)) * (4 * self.rows - 1))
        return column, row


def smooth(points: Sequence[Point]) -> list[Point]:
    """Exponential moving average, freed of its start (Kingma & Ba 2015, section 3)."""
    result, mean, weight = [], 0.0, 0.0
    for step, value in points:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        result.append((step, mean / weight))
    return result


def draw(raw: Sequence[Point], marked: Sequence[Point], last: float, columns: int, rows: int) -> list[Text]:
    """`rows` lines of `columns` cells and an axis: dim dots for `raw`, a line through their mean, ◆ for `marked`.

    Points that are no finite number are left out. Values run from the lowest shown to the highest.
    """
    raw, marked = (finite(points) for points in (raw, marked))
    if not raw and not marked:
        return [Text("waiting for the first step", style="dim"), *(Text("") for _ in range(rows - 1))]
    line = smooth(raw)
    values = [value for _, value in [*line, *marked, *raw[-1:]]]
    scale = Scale(last, min(values), max(values), max(1, columns - 8), rows)
    cells = _cells(raw, line, scale)
    marks = {(dot[0] // 2, dot[1] // 4) for dot in map(scale.dot, marked)}
    return [_row(row, cells, marks, scale) for row in range(rows)]


def finite(points: Sequence[Point]) -> list[Point]:
    return [point for point in points if math.isfinite(point[1])]


def _cells(raw: Sequence[Point], line: Sequence[Point], scale: Scale) -> dict[tuple[int, int], tuple[int, bool]]:
    """Dots by cell, and whether the smoothed line passes through it."""
    cells: dict[tuple[int, int], tuple[int, bool]] = {}

    def put(column: int, row: int, on_line: bool) -> None:
        cell = (column // 2, row // 4)
        bits, has_line = cells.get(cell, (0, False))
        cells[cell] = (bits | DOTS[column % 2][row % 4], has_line or on_line)

    for point in raw:
        put(*scale.dot(point), on_line=False)
    dots = [scale.dot(point) for point in line]
    for start, end in pairwise(dots):
        for column, row in _between(start, end):
            put(column, row, on_line=True)
    return cells


def _between(start: tuple[int, int], end: tuple[int, int]) -> list[tuple[int, int]]:
    """Every dot on the way from one dot to another."""
    length = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
    return [
        (round(start[0] + (end[0] - start[0]) * i / length), round(start[1] + (end[1] - start[1]) * i / length))
        for i in range(length + 1)
    ]


def _row(row: int, cells: dict[tuple[int, int], tuple[int, bool]], marks: set[tuple[int, int]], scale: Scale) -> Text:
    """One line: the axis, and the cells in their colours."""
    value = scale.high - (scale.high - scale.low) * row / max(1, scale.rows - 1)
    is_labelled = row in (0, scale.rows - 1) or row * 2 == scale.rows - 1
    text = Text(f"{value:6.2f} " if is_labelled else " " * 7, style="dim")
    text.append("┤" if is_labelled else "│", style="dim")
    for column in range(scale.columns):
        bits, on_line = cells.get((column, row), (0, False))
        if (column, row) in marks:
            text.append("◆", style="yellow")
        else:
            text.append(chr(BLANK + bits) if bits else " ", style="blue" if on_line else "dim")
    return text
