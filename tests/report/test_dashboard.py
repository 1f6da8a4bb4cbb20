import io
import math
import random
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime

import pytest
from made_events import events_of_a_run, halfway, view_after
from rich.console import Console

from qtune.commands.terminal import listener_for
from qtune.events import (
    Evaluated,
    Event,
    Finished,
    MemoryMeasured,
    Notice,
    Saved,
    Scored,
    Started,
    StepDone,
)
from qtune.report.braille_plot import BEST_MARK
from qtune.report.dashboard import Dashboard, render
from qtune.report.dashboard_state import View, advance
from qtune.report.log_lines import PlainLines

LONG_NOTICE = "[red]a notice\x1b[2J with 漢字, markup and no end to it " * 9


@pytest.fixture
def half_view() -> View:
    return halfway()


@pytest.fixture(scope="module")
def run_events() -> list[Event]:
    return list(events_of_a_run())


@pytest.fixture
def host_view() -> View:
    return halfway(on_card=False)


@pytest.fixture
def whole_view() -> View:
    return view_after(events_of_a_run())


def lines_of(view: View, width: int, height: int) -> list[str]:
    """The picture as a console of that size prints it."""
    console = Console(width=width, height=height, file=io.StringIO(), force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(render(view, width, height))
    return capture.get().splitlines()


def shown(view: View, width: int, height: int) -> str:
    return "\n".join(lines_of(view, width, height))


@pytest.mark.parametrize(("width", "height"), [(80, 24), (100, 30), (110, 30), (120, 40), (200, 60)])
def test_everything_that_matters_is_on_an_ordinary_terminal(half_view: View, width: int, height: int) -> None:
    text = shown(half_view, width, height - 1)
    for fact in ("step 176 of 282", "62 %", "7 min, done at 12:18", "4,133", "6.2e-5", "1.87", "best held-out 1.248"):
        assert fact in text
    for fact in ("device memory", "peak 4.8 GiB of 8.0 GiB", "activations and workspace", "free"):
        assert fact in text
    assert "held-out 1.257 → 1.248, best so far" in text
    assert text.count("│") + text.count("┤") >= 6
    assert "…" not in text


def test_a_narrow_terminal_keeps_the_numbers_whole(half_view: View) -> None:
    lines = lines_of(half_view, 40, 19)
    text = "\n".join(lines)
    for fact in ("step 176 of 282", "left 7 min, done at 12:18", "tokens/s 4,133", "peak 4.8 GiB of 8.0 GiB"):
        assert fact in text
    assert max(map(len, lines)) <= 40


def test_events_go_first_then_the_legend_then_the_memory(half_view: View) -> None:
    kept = []
    for height in range(23, 4, -1):
        text = shown(half_view, 80, height)
        assert "step 176 of 282" in text
        kept.append(("best so far" in text, "optimizer" in text, "device memory" in text))
    assert kept[0] == (True, True, True)
    assert kept[-1] == (False, False, False)
    gone = [next(i for i, row in enumerate(kept) if not row[part]) for part in range(3)]
    assert gone[0] < gone[1] < gone[2]


@pytest.mark.parametrize(("width", "height"), [(40, 30), (80, 24), (110, 30)])
def test_without_a_gpu_the_bar_says_so(host_view: View, width: int, height: int) -> None:
    text = shown(host_view, width, height)
    assert "host memory (this machine has no GPU)" in text
    assert "peak 943 MiB of 16 GiB" in text


def test_a_long_notice_is_read_to_its_end_where_there_is_room(half_view: View) -> None:
    notice = (
        "The template has no system role, so a system prompt is put before the first question of each conversation."
    )
    view = advance(half_view, Notice(notice), datetime(2026, 11, 24, 12, 0))
    for size in ((80, 24), (120, 40)):
        assert "conversation." in shown(view, *size)
    endless = advance(half_view, Notice("word " * 500), datetime(2026, 11, 24, 12, 0))
    assert "word …" in shown(endless, 80, 24)


def test_before_the_first_event_there_is_a_picture_too() -> None:
    text = shown(View("medical", 282), 80, 24)
    assert "step 0 of 282" in text
    assert "no step yet" in text


def test_a_finished_run_forecasts_nothing(whole_view: View) -> None:
    text = shown(whole_view, 120, 40)
    assert "step 282 of 282  100 %" in text
    assert "done at" not in text
    assert "adapter saved (66 MiB, 0.4 s)" in text


def test_waiting_for_data_is_shown_from_one_percent_on(half_view: View) -> None:
    def with_wait(seconds: float) -> View:
        return replace(half_view, recent=tuple(replace(done, wait_seconds=seconds) for done in half_view.recent))

    assert "waiting" not in shown(with_wait(0.03), 80, 24)
    assert "waiting for data 12.8 %" in shown(with_wait(0.5), 80, 24)


def test_a_loss_that_goes_the_wrong_way_is_said_in_words(half_view: View) -> None:
    losses = tuple((float(i), 1.0 + abs(i - 100) / 100) for i in range(176))
    assert "rising for 75 steps" in shown(replace(half_view, losses=losses), 80, 24)
    worse = (*half_view.held_out, Evaluated(170, 1.3, False, 1.0), Evaluated(172, 1.4, False, 1.0))
    assert "held-out rose 2 times in a row" in shown(replace(half_view, held_out=worse), 80, 24)
    assert "rising" not in shown(half_view, 80, 24)


def test_the_clock_names_the_day_when_it_is_not_today(half_view: View) -> None:
    assert "done at Wed " in shown(replace(half_view, steps=20_000), 120, 40)
    assert "done at 03 " in shown(replace(half_view, steps=200_000), 120, 40)


def test_at_most_four_colours(half_view: View) -> None:
    colours = {
        span.style if isinstance(span.style, str) else str(span.style)
        for view in (half_view, replace(half_view, held_out=(*half_view.held_out, half_view.held_out[0]) * 3))
        for size in ((80, 24), (120, 40))
        for span in render(view, *size).spans
    }
    words = {word for style in colours for word in style.split()}
    assert words <= {"bold", "dim", "cyan", "green", "yellow", "red"}
    assert BEST_MARK in shown(half_view, 80, 24)


def random_event(dice: random.Random) -> Event:
    number = dice.choice([0, 1, 2, 3, 282, 10**12])
    amount: Callable[[], float] = lambda: dice.choice([0.0, 1.5, -1.0, 1e-12, 1e300, math.nan, math.inf, -math.inf])  # noqa: E731
    size = dice.choice([0, 1, 5 * 1024**3, 10**18])
    parts = tuple((name, size) for name in dice.sample(["base", "adapter", "python and libraries", "new"], 2))
    return dice.choice(
        [
            Started(number, number, number),
            StepDone(number, amount(), amount(), amount(), amount(), number, number, amount(), amount()),
            StepDone(number, 1.0, 1.3, 1e-4, 0.4, 4_000, 3_000, 0.3, 0.0),
            Evaluated(number, amount(), dice.random() < 0.5, amount()),
            MemoryMeasured(number, parts, size, dice.choice([0, 1, 8 * 1024**3]), dice.choice([0, size])),
            Scored("base", dice.choice([None, amount()]), "token_f1", dice.choice([None, 0.5]), number, amount()),
            Saved("adapter\n", size, amount()),
            Notice(LONG_NOTICE),
            Finished(number, amount()),
        ]
    )


@pytest.mark.parametrize("seed", range(80))
def test_any_stream_of_events_is_drawn_inside_the_terminal(seed: int) -> None:
    dice = random.Random(seed)
    view = View(dice.choice(["medical", LONG_NOTICE, ""]), dice.choice([0, 1, 282]))
    for _ in range(30):
        view = advance(view, random_event(dice), datetime(2026, 11, 24, 12, 0))
        width, height = dice.randrange(1, 180), dice.randrange(1, 60)
        text = render(view, width, height)
        rows = text.plain.split("\n")
        assert len(rows) <= height
        assert all(line.cell_len <= width for line in text.split("\n"))
        assert "\x1b" not in text.plain


def test_an_event_costs_far_less_than_a_step(run_events: list[Event]) -> None:
    dashboard = Dashboard("medical", 282, Console(file=io.StringIO()))
    began = time.process_time()
    for _ in range(10):
        for event in run_events:
            dashboard(event)
    assert (time.process_time() - began) / (10 * len(run_events)) < 0.2e-3


def test_a_picture_costs_a_few_milliseconds(half_view: View) -> None:
    """The cheapest of ten: what else the machine does only makes one dearer."""
    console = Console(width=120, height=40, file=io.StringIO(), force_terminal=True)
    seconds = []
    for _ in range(10):
        began = time.process_time()
        console.print(render(half_view, 120, 39))
        seconds.append(time.process_time() - began)
    assert min(seconds) < 0.03


def test_a_file_gets_plain_lines_even_where_colour_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert isinstance(listener_for(Console(file=io.StringIO()), "medical", 282), PlainLines)
