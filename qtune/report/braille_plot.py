"""The loss as a picture of characters: a smoothed line over the raw dots, held-out losses marked.

A braille character holds 2 x 4 dots (U+2800 plus one bit per dot), so a plot of W x H cells has 2W x 4H of them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from rich.text import Text

from qtune.report.dashboard_state import Point

DOT_BITS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
BRAILLE = 0x2800
LINE_STYLE, MARK_STYLE, BEST_STYLE = "cyan", "yellow", "bold yellow"
MARK, BEST_MARK = "◇", "◆"
LEAST_SMOOTHING_STEPS = 5.0
SMOOTHING_FRACTION = 1 / 30
OUTLIER_FRACTION = 0.02
FARTHEST = 1e12

LEAST_RISE_STEPS = 20
LEAST_RISE_FRACTION = 0.03
RISE_OVER_NOISE = 1.5


@dataclass(frozen=True)
class Frame:
    """Where values land: `columns` x `rows` cells over steps `first`..`last` and losses `low`..`high`."""

    columns: int
    rows: int
    first: float
    last: float
    low: float
    high: float

    def dot_x(self, step: float) -> int:
        """Dot column of a step, from the left."""
        return _scaled(step, self.first, self.last, 2 * self.columns)

    def dot_y(self, loss: float) -> int:
        """Dot row of a loss, from the top; values outside land on the edge."""
        dots = 4 * self.rows
        return dots - 1 - _scaled(loss, self.low, self.high, dots)


def draw(points: Sequence[Point], marks: Sequence[Point], width: int, height: int) -> list[Text]:
    """`height` lines of at most `width` cells: the plot with its y axis, then the axis of steps.

    `points` and `marks` are (step, loss). The lowest mark is filled. In fewer than two lines or twelve columns
    nothing is drawn.
    """
    marks = [mark for mark in marks if math.isfinite(mark[1])]
    if width < 12 or height < 2 or not (points or marks):
        return []
    frame, y_labels = _frame(points, marks, width, height)
    raw, line = _canvas(frame), _canvas(frame)
    for step, loss in points:
        _dot(raw, frame.dot_x(step), frame.dot_y(loss))
    _draw_line(line, frame, smooth(points))
    best = min(marks, key=lambda mark: mark[1], default=None)
    placed = {_cell(frame, mark): (MARK, MARK_STYLE) for mark in marks if mark != best}
    if best:
        placed[_cell(frame, best)] = (BEST_MARK, BEST_STYLE)
    labels = {frame.dot_y(value) // 4: text for value, text in y_labels}
    margin = width - frame.columns - 1
    lines = []
    for row in range(frame.rows):
        text = Text.assemble((labels.get(row, "").rjust(margin) + ("┤" if row in labels else "│"), "dim"))
        for style, cells in groupby(_row(raw[row], line[row], row, placed), key=lambda cell: cell[1]):
            text.append("".join(char for char, _ in cells), style)
        lines.append(text)
    return [*lines, _step_axis(frame, margin)]


def smooth(points: Sequence[Point]) -> list[Point]:
    """Each loss as a mean of its neighbours on both sides, weighted exp(-distance / scale).

    The scale is a thirtieth of the steps drawn, five at the least. At the end there is only one side, so the line
    there still moves as the run goes on.
    """
    if not points:
        return []
    scale = max(LEAST_SMOOTHING_STEPS, SMOOTHING_FRACTION * abs(points[-1][0] - points[0][0]))
    before = _decaying_sums(points, scale)
    after = list(reversed(_decaying_sums(points[::-1], scale)))
    return [
        (step, (b_sum + a_sum - loss) / (b_weight + a_weight - 1))
        for (step, loss), (b_sum, b_weight), (a_sum, a_weight) in zip(points, before, after, strict=True)
    ]


def rising_steps(points: Sequence[Point]) -> int:
    """For how many steps the smoothed loss has been above its minimum; 0 where that is no more than noise."""
    if len(points) < LEAST_RISE_STEPS:
        return 0
    line = smooth(points)
    lowest = min(line, key=lambda point: point[1])
    steps, rise = int(line[-1][0] - lowest[0]), line[-1][1] - lowest[1]
    noise = math.sqrt(sum((raw[1] - even[1]) ** 2 for raw, even in zip(points, line, strict=True)) / len(points))
    matters = rise > LEAST_RISE_FRACTION * abs(lowest[1]) and rise > RISE_OVER_NOISE * noise
    return steps if steps >= LEAST_RISE_STEPS and matters else 0


def _decaying_sums(points: Sequence[Point], scale: float) -> list[Point]:
    """Per point the weighted sum of it and all before it, and the sum of the weights."""
    sums, total, weight, at = [], 0.0, 0.0, points[0][0]
    for step, loss in points:
        decay = math.exp(-abs(step - at) / scale)
        total, weight, at = total * decay + loss, weight * decay + 1.0, step
        sums.append((total, weight))
    return sums


def _frame(
    points: Sequence[Point], marks: Sequence[Point], width: int, height: int
) -> tuple[Frame, list[tuple[float, str]]]:
    """The frame that the values and the labels of their axis leave room for, and those labels."""
    steps = [step for step, _ in (*points, *marks)]
    low, high = loss_range(points, marks)
    labels = ticks(low, high, max(2, min(6, (height - 1) // 3)))
    margin = max(len(text) for _, text in labels) + 1
    return Frame(max(1, width - margin - 1), height - 1, min(steps), max(steps), low, high), labels


def loss_range(points: Sequence[Point], marks: Sequence[Point]) -> tuple[float, float]:
    """Lowest and highest loss drawn; a few raw outliers at the top do not flatten all the others."""
    losses = sorted(loss for _, loss in points)
    losses = losses[: len(losses) - int(OUTLIER_FRACTION * len(losses))]
    values = [*losses[:1], *losses[-1:], *(loss for _, loss in marks)]
    low, high = (max(-FARTHEST, min(FARTHEST, value)) for value in (min(values), max(values)))
    pad = 0.02 * (high - low) or max(0.05 * abs(high), 0.01)
    return low - pad, high + pad


def ticks(low: float, high: float, most: int) -> list[tuple[float, str]]:
    """Round values between `low` and `high`, at most `most + 1` of them, and their labels."""
    unit = 10.0 ** math.floor(math.log10((high - low) / most) - 1)
    strides = (unit * factor for factor in (1, 2, 5, 10, 20, 50, 100))
    stride = next(stride for stride in strides if math.floor(high / stride) - math.ceil(low / stride) <= most)
    decimals = max(0, -math.floor(math.log10(stride) + 1e-9))
    values = [stride * i for i in range(math.ceil(low / stride), math.floor(high / stride) + 1)]
    return [(value, f"{value:.{decimals}f}" if abs(value) < 1000 else f"{value:.2g}") for value in values]


def _step_axis(frame: Frame, margin: int) -> Text:
    first, last = f"{frame.first:,.0f}", f"step {frame.last:,.0f}"
    fill = frame.columns - len(first) - len(last) - 3
    middle = f" {first} {'─' * fill} {last}" if fill >= 1 else "─" * frame.columns
    return Text(" " * margin + "└" + middle, "dim")


def _row(
    raw: list[int], line: list[int], row: int, placed: dict[tuple[int, int], tuple[str, str]]
) -> list[tuple[str, str]]:
    """(character, style) per cell of one row: a mark hides dots, the line colours the dots it shares a cell with."""
    cells = []
    for column, (dots, dots_of_line) in enumerate(zip(raw, line, strict=True)):
        if (row, column) in placed:
            cells.append(placed[row, column])
        elif dots_of_line:
            cells.append((chr(BRAILLE | dots | dots_of_line), LINE_STYLE))
        else:
            cells.append((chr(BRAILLE | dots) if dots else " ", "dim"))
    return cells


def _draw_line(canvas: list[list[int]], frame: Frame, line: Sequence[Point]) -> None:
    """One dot column after the other, upright strokes where the line is steep."""
    losses_by_x: dict[int, list[float]] = {}
    for step, loss in line:
        losses_by_x.setdefault(frame.dot_x(step), []).append(loss)
    corners = [(x, frame.dot_y(sum(losses) / len(losses))) for x, losses in sorted(losses_by_x.items())]
    for x, y in corners[:1]:
        _dot(canvas, x, y)
    for (x, y), (next_x, next_y) in pairwise(corners):
        at = y
        for step in range(1, next_x - x + 1):
            to = y + round((next_y - y) * step / (next_x - x))
            for dot in range(min(at, to), max(at, to) + 1):
                if dot != at or at == to:
                    _dot(canvas, x + step, dot)
            at = to


def _canvas(frame: Frame) -> list[list[int]]:
    return [[0] * frame.columns for _ in range(frame.rows)]


def _dot(canvas: list[list[int]], x: int, y: int) -> None:
    canvas[y // 4][x // 2] |= DOT_BITS[y % 4][x % 2]


def _cell(frame: Frame, point: Point) -> tuple[int, int]:
    return frame.dot_y(point[1]) // 4, frame.dot_x(point[0]) // 2


def _scaled(value: float, low: float, high: float, count: int) -> int:
    """0 .. count-1 for low .. high."""
    share = (value - low) / (high - low) if high > low else 0.0
    return round(max(0.0, min(1.0, share)) * (count - 1))
