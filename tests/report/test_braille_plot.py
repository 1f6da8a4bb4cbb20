import math
import random

import pytest

from qtune.report.braille_plot import BEST_MARK, BRAILLE, MARK, draw, rising_steps, smooth


def noisy(losses: list[float], seed: int = 0, noise: float = 0.05) -> list[tuple[float, float]]:
    dice = random.Random(seed)
    return [(float(step), loss + dice.gauss(0, noise)) for step, loss in enumerate(losses)]


def plain(*arguments: object) -> list[str]:
    return [line.plain for line in draw(*arguments)]  # type: ignore[arg-type]


def test_a_falling_line_runs_from_the_top_left_to_the_bottom_right() -> None:
    lines = plain([(float(i), 3.0 - i / 50) for i in range(101)], [], 40, 9)
    inked = [[column for column, char in enumerate(line) if ord(char) > BRAILLE] for line in lines[:-1]]
    middles = [sum(columns) / len(columns) for columns in inked]
    assert middles == sorted(middles)
    assert {column for columns in inked for column in columns} == set(range(lines[-1].index("└") + 1, 40))


def test_the_axis_names_round_losses_in_order_and_the_steps() -> None:
    lines = plain([(float(i), 2.3 - i / 100) for i in range(1, 101)], [], 60, 13)
    labels = [float(line.split("┤")[0]) for line in lines if "┤" in line]
    assert labels == sorted(labels, reverse=True)
    assert 2 <= len(labels) <= 6
    assert lines[-1].split() == ["└", "1", lines[-1].split()[2], "step", "100"]


def test_held_out_losses_are_marked_and_the_best_is_filled() -> None:
    text = "\n".join(plain([(float(i), 2.0) for i in range(100)], [(20.0, 2.4), (50.0, 1.6), (80.0, 1.8)], 60, 12))
    assert text.count(MARK) == 2
    assert text.count(BEST_MARK) == 1


def test_one_early_outlier_does_not_flatten_the_rest() -> None:
    points = [(0.0, 500.0), *((float(i), 2.0 - i / 200) for i in range(1, 200))]
    top = next(float(line.split("┤")[0]) for line in plain(points, [], 60, 12) if "┤" in line)
    assert top <= 2.0


def test_smoothing_keeps_a_constant_and_calms_noise() -> None:
    assert [loss for _, loss in smooth([(float(i), 1.5) for i in range(50)])] == pytest.approx([1.5] * 50)
    raw = noisy([1.0] * 300)
    spread = max(abs(loss - 1.0) for _, loss in smooth(raw)[20:-20])
    assert spread < 0.03 < max(abs(loss - 1.0) for _, loss in raw)


def test_a_run_that_turns_upwards_is_noticed_and_noise_is_not() -> None:
    turning = [1.3 - 0.002 * min(i, 200) + 0.004 * max(0, i - 200) for i in range(280)]
    assert 70 <= rising_steps(noisy(turning)) <= 95
    assert rising_steps(noisy(turning[:205])) == 0
    flat = sum(rising_steps(noisy([1.3] * 200, seed, 0.1)) > 0 for seed in range(100))
    assert flat <= 2


@pytest.mark.parametrize("seed", range(60))
def test_whatever_comes_is_drawn_inside_its_box(seed: int) -> None:
    dice = random.Random(seed)
    extremes = [0.0, 1.0, -1.0, 1e-9, 1e9, 1e300, -1e300, 1.0000001]
    points = [(float(dice.randrange(10**6)), dice.choice(extremes)) for _ in range(dice.randrange(0, 40))]
    marks = [
        (float(dice.randrange(100)), dice.choice([*extremes, math.nan, math.inf])) for _ in range(dice.randrange(4))
    ]
    width, height = dice.randrange(1, 150), dice.randrange(0, 50)
    lines = draw(points, marks, width, height)
    assert len(lines) in (0, height)
    assert all(line.cell_len <= width for line in lines)
