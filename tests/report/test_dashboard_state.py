import math
from datetime import datetime, timedelta

import pytest

from qtune.events import Evaluated, Event, Finished, Notice, Started, StepDone
from qtune.report.dashboard_state import MOST_MESSAGES, MOST_POINTS, View, advance, with_point

NOON = datetime(2026, 11, 24, 12, 0)


def step(number: int, seconds: float = 2.0, wait: float = 0.0, loss: float = 1.0) -> StepDone:
    return StepDone(number, 0.1, loss, 1e-4, 0.5, 1_000, 600, seconds, wait)


def view_of(*events: Event) -> View:
    view = View("run", 0)
    for event in events:
        view = advance(view, event, NOON)
    return view


def test_pace_and_time_left_follow_the_last_twenty_steps() -> None:
    slow, fast = [step(i, 50.0) for i in range(1, 11)], [step(i, 2.0, 0.5) for i in range(11, 41)]
    view = view_of(Started(100, 10, 0), *slow, *fast)
    assert view.tokens_per_second == 500
    assert view.wait_fraction == 0.25
    assert view.seconds_left == 60 * 2.0
    assert view.done_at == NOON + timedelta(seconds=120)


def test_an_event_that_stands_for_ten_steps_is_counted_as_ten() -> None:
    view = view_of(Started(100, 10, 0), *(step(i, 20.0) for i in range(10, 51, 10)))
    assert view.seconds_left == pytest.approx(50 * 2.0)


def test_time_left_has_room_for_the_held_out_losses_to_come() -> None:
    steps = [step(i) for i in range(1, 51)]
    view = view_of(Started(100, 10, 5), *steps, Evaluated(25, 1.0, True, 30.0), Evaluated(50, 0.9, True, 30.0))
    assert view.seconds_left == pytest.approx(50 * 2.0 + 60.0)


def test_the_held_out_loss_before_the_first_step_does_not_come_again() -> None:
    """It may take minutes on a cold machine, and was spread over all steps to come."""
    steps = [step(i) for i in range(1, 51)]
    view = view_of(Started(100, 10, 5), Evaluated(0, 2.0, True, 900.0), *steps)
    assert view.seconds_left == pytest.approx(50 * 2.0)


def test_before_the_first_step_and_after_the_last_nothing_is_forecast() -> None:
    assert view_of(Started(100, 10, 0)).seconds_left is None
    assert view_of(Started(2, 10, 0), step(1), step(2), Finished(2, 4.0)).seconds_left is None


def test_no_clock_time_is_made_of_a_step_that_took_forever() -> None:
    assert view_of(Started(10**9, 10, 0), step(1, 1e300)).done_at is None
    assert view_of(Started(100, 10, 0), step(1, math.nan), step(2, math.inf)).seconds_left is None


def test_held_out_rises_counts_back_from_the_last() -> None:
    losses = [Evaluated(i, loss, False, 1.0) for i, loss in enumerate((1.0, 1.1, 0.9, 1.0, 1.2, 1.3))]
    assert view_of(*losses).held_out_rises == 3
    assert view_of(*losses[:3]).held_out_rises == 0
    assert view_of(losses[0]).held_out_rises == 0


def test_points_are_thinned_in_long_runs_and_keep_their_mean() -> None:
    points: tuple[tuple[float, float], ...] = ()
    for number in range(10 * MOST_POINTS):
        points = with_point(points, (float(number), 2.0))
        assert len(points) <= MOST_POINTS
    assert {loss for _, loss in points} == {2.0}
    assert points[-1][0] == 10 * MOST_POINTS - 1
    assert [number for number, _ in points] == sorted(number for number, _ in points)


def test_a_loss_that_is_no_number_is_shown_and_not_drawn() -> None:
    view = view_of(step(1), step(2, loss=math.nan))
    assert view.losses == ((1.0, 1.0),)
    assert view.last is not None
    assert math.isnan(view.last.loss)


def test_only_the_last_sentences_are_kept() -> None:
    view = view_of(*(Notice(f"notice {i}") for i in range(50)))
    assert len(view.messages) == MOST_MESSAGES
    assert view.messages[-1] == (0, "notice 49")
