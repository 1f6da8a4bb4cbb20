"""Where things lie on a chart."""

import math
import random
import re

import pytest

from qtune.report import svg_chart
from qtune.report.svg_chart import Axis


def labels(axis: Axis) -> list[str]:
    return [text for _, text in axis.ticks]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.3, 5.2, ["0.5", "1", "2", "5"]),
        (0.002, 4.4, ["0.01", "0.1", "1"]),
        (1.0, 4.5, ["1", "1.5", "2", "3"]),
        (1e-3, 1e12, ["0.001", "1", "1000", "1e+06", "1e+09", "1e+12"]),
    ],
)
def test_a_logarithmic_axis_has_round_labels_at_their_logarithms(low: float, high: float, expected: list[str]) -> None:
    axis = svg_chart.log_axis(low, high)
    assert labels(axis) == expected
    for place, text in axis.ticks:
        assert place == pytest.approx(math.log(float(text) / low) / math.log(high / low))


@pytest.mark.parametrize("seed", range(20))
def test_every_axis_has_a_few_labels_inside(seed: int) -> None:
    dice = random.Random(seed)
    low = 10 ** dice.uniform(-6, 6)
    high = low * 10 ** dice.uniform(0.6, 8)
    for axis in (
        svg_chart.log_axis(low, high),
        svg_chart.linear_axis(low, high),
        svg_chart.step_axis(1, 1 + seed * 37),
    ):
        assert 1 <= len(axis.ticks) <= svg_chart.MOST_TICKS
        assert all(0 <= place <= 1 for place, _ in axis.ticks)


def test_thousands_are_told_in_full() -> None:
    assert labels(svg_chart.linear_axis(0, 4_400)) == ["0", "1,000", "2,000", "3,000", "4,000"]
    assert labels(svg_chart.linear_axis(0, 5 * 2**30, 2**30)) == ["0", "1", "2", "3", "4", "5"]


def test_losses_that_fall_far_are_drawn_on_a_logarithmic_axis_and_others_are_not() -> None:
    assert svg_chart.loss_axis([(1, 4.0), (2, 0.2)], []).is_log
    assert not svg_chart.loss_axis([(1, 2.0), (2, 1.2)], []).is_log
    assert not svg_chart.loss_axis([(1, 2.0), (2, 0.0)], []).is_log  # a loss of nothing has no logarithm
    assert svg_chart.loss_axis([(1, 1.0)], []).place(1.0) == pytest.approx(0.5)


def test_thinning_keeps_order_ends_and_every_spike() -> None:
    points = [(float(i), 1.0) for i in range(10_000)]
    points[5_003] = (5_003.0, 90.0)
    points[7_777] = (7_777.0, -4.0)
    kept = svg_chart.thinned(points)
    assert len(kept) <= svg_chart.MOST_POINTS
    assert kept == sorted(kept)
    assert {points[5_003], points[7_777]} <= set(kept)
    assert svg_chart.thinned(points[:10]) == points[:10]


def test_lines_and_dots_are_paths_inside_the_plot() -> None:
    x, y = Axis(0, 10), Axis(0, 2)
    assert svg_chart.line([(0, 0), (5, 1), (10, 9)], x, y) == "M0 1000L500 500L1000 0"
    assert svg_chart.dots([(5, 1)], x, y) == "M500 500h0"
    assert svg_chart.level(0.5, y) == "M0 750H1000"
    assert svg_chart.area([(0, 2), (10, 2)], [(0, 1), (10, 1)], x, y) == "M0 0L1000 0L1000 500L0 500Z"
    assert svg_chart.line([], x, y) == ""


@pytest.mark.parametrize("count", [1, 2, 7, 120, 121, 5_000])
def test_strips_tile_the_plot_and_tell_every_point_once(count: int) -> None:
    points = [(float(i), float(i)) for i in range(count)]
    strips = svg_chart.hovers(points, svg_chart.step_axis(0, max(1, count - 1)), lambda part: f"{len(part)}")
    assert len(strips) == min(count, svg_chart.MOST_HOVERS)
    assert sum(int(strip.title) for strip in strips) == count
    assert strips[0].left == 0
    assert strips[-1].left + strips[-1].width == pytest.approx(svg_chart.UNITS, abs=0.2)
    assert all(re.fullmatch(r"\d+(\.\d)?", f"{strip.left}") for strip in strips)
