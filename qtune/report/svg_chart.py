"""Charts for a page: where lines, areas and ticks lie, as shares of a plot, from 0 to 1.

A plot is drawn stretched to whatever room there is, 1,000 x 1,000 units of it; its labels are text beside it, so that
they stay readable on a phone. y is counted from the top, as SVG does.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

from qtune.report import braille_plot
from qtune.report.dashboard_state import Point

Item = TypeVar("Item")

UNITS = 1000
MOST_POINTS = 600
MOST_HOVERS = 120
LOG_FROM_RATIO = 4.0
MOST_TICKS = 6
LOG_LABELS: tuple[tuple[int, tuple[float, ...]], ...] = (  # every so many powers of ten, times these; coarse to fine
    (6, (1,)),
    (3, (1,)),
    (2, (1,)),
    (1, (1,)),
    (1, (1, 3)),
    (1, (1, 2, 5)),
    (1, (1, 1.5, 2, 3, 5, 7)),
    (1, (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)),
)


@dataclass(frozen=True)
class Axis:
    """Values `low`..`high` over the length of one side; `ticks` are (place, label)."""

    low: float
    high: float
    is_log: bool = False
    ticks: tuple[tuple[float, str], ...] = ()

    def place(self, value: float) -> float:
        """0 at `low`, 1 at `high`; what lies outside lands on the edge."""
        low, high = self.low, self.high
        if self.is_log:
            value, low, high = (math.log(max(each, low)) for each in (value, low, high))
        return min(1.0, max(0.0, (value - low) / (high - low))) if high > low else 0.5


@dataclass(frozen=True)
class Shape:
    """An SVG path; `style` is its CSS class, `name` what it stands for."""

    d: str
    style: str
    name: str


@dataclass(frozen=True)
class Hover:
    """An upright strip of the plot that says what is there when it is pointed at."""

    left: float
    width: float
    title: str


@dataclass(frozen=True)
class Key:
    """A line of the legend; `value` may be empty."""

    style: str
    name: str
    value: str = ""


@dataclass(frozen=True)
class Chart:
    """One plot. `label` says in a sentence what is seen, for those who do not see it."""

    label: str
    x: Axis
    y: Axis
    x_title: str
    y_title: str
    shapes: tuple[Shape, ...]
    hovers: tuple[Hover, ...] = ()
    keys: tuple[Key, ...] = ()


def loss_axis(points: Sequence[Point], marks: Sequence[Point]) -> Axis:
    """Logarithmic where the losses span more than four times, so that the end of a run is not a flat line."""
    low, high = braille_plot.loss_range(points, marks)
    least = min(loss for _, loss in (*points, *marks))
    if least > 0 and high / least >= LOG_FROM_RATIO:
        return log_axis(least * 0.93, high * 1.05)
    return linear_axis(low, high)


def log_axis(low: float, high: float) -> Axis:
    """As many round labels as there is room for: every third power of ten for a long span, 1.2, 1.5, 2 for a short."""
    axis = Axis(low, high, is_log=True)
    exponents = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    chosen: list[float] = []
    for stride, mantissas in LOG_LABELS:
        powers = (10.0**exponent for exponent in exponents if exponent % stride == 0)
        inside = [value for power in powers for value in (power * m for m in mantissas) if low <= value <= high]
        if len(inside) > MOST_TICKS:
            break
        chosen = inside
    return Axis(low, high, True, tuple((axis.place(value), f"{value:g}") for value in chosen))


def linear_axis(low: float, high: float, unit: float = 1.0) -> Axis:
    """Round labels, in units of `unit`."""
    axis = Axis(low, high)
    found = braille_plot.ticks(low / unit, high / unit, MOST_TICKS - 1) if high > low else []
    labels = ((value, text if abs(value) < 1000 else f"{value:,.0f}") for value, text in found)
    return Axis(low, high, False, tuple((axis.place(value * unit), text) for value, text in labels))


def step_axis(first: float, last: float) -> Axis:
    """Whole steps."""
    axis = Axis(first, last)
    if last <= first:
        return Axis(first, last, False, ((0.5, f"{first:,.0f}"),))
    found = [value for value, _ in braille_plot.ticks(first, last, MOST_TICKS - 1) if value == round(value)]
    return Axis(first, last, False, tuple((axis.place(value), f"{value:,.0f}") for value in found))


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most `most` of the points: the lowest and the highest of each stretch, so that no spike is lost."""
    if len(points) <= most:
        return list(points)
    kept: list[Point] = []
    for part in stretches(points, most // 2):
        ends = {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept


def stretches(items: Sequence[Item], most: int) -> list[Sequence[Item]]:
    """`items` cut into at most `most` stretches of like length, none of them empty."""
    count = min(most, len(items))
    edges = [len(items) * i // count for i in range(count + 1)] if count else []
    return [items[start:end] for start, end in pairwise(edges)]


def line(points: Sequence[Point], x: Axis, y: Axis) -> str:
    """A path through the points."""
    corners = [f"{_at(x.place(a))} {_at(1 - y.place(b))}" for a, b in points]
    return "M" + "L".join(corners) if corners else ""


def dots(points: Sequence[Point], x: Axis, y: Axis) -> str:
    """A path of strokes of no length, which round caps turn into dots that are round however the plot is stretched."""
    return "".join(f"M{_at(x.place(a))} {_at(1 - y.place(b))}h0" for a, b in points)


def area(upper: Sequence[Point], lower: Sequence[Point], x: Axis, y: Axis) -> str:
    """The path around what lies between two lines over the same places."""
    return f"{line(upper, x, y)}L{line(list(reversed(lower)), x, y)[1:]}Z" if upper else ""


def level(value: float, y: Axis) -> str:
    """A path straight across."""
    return f"M0 {_at(1 - y.place(value))}H{UNITS}"


def hovers(points: Sequence[Point], x: Axis, told: Callable[[Sequence[Point]], str]) -> tuple[Hover, ...]:
    """Strips that tile the plot, at most 120; `told` says what one of them says, given its points."""
    parts = stretches(points, MOST_HOVERS)
    middles = [(x.place(part[0][0]) + x.place(part[-1][0])) / 2 for part in parts]
    edges = [0.0, *((a + b) / 2 for a, b in pairwise(middles)), 1.0]
    return tuple(
        Hover(round(left * UNITS, 1), round((right - left) * UNITS, 1), told(part))
        for left, right, part in zip(edges[:-1], edges[1:], parts, strict=True)
    )


def _at(share: float) -> str:
    return f"{share * UNITS:.1f}".removesuffix(".0")
