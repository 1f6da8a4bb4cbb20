import io
import subprocess
import sys
from dataclasses import replace

import pytest
from made_events import events_of_a_run, halfway

from qtune.events import Event, RanksStanding, StepDone
from qtune.report.dashboard_state import View
from qtune.report.log_lines import PlainLines, step_line

READER_GOES_AWAY = """
import sys
from qtune.events import Notice
from qtune.report.log_lines import PlainLines
with PlainLines(sys.stdout, 3) as lines:
    lines(Notice("one"))
    sys.stdin.readline()
    for number in range(5_000):
        lines(Notice(f"line {number}"))
print("and more, at the end")
print("the run went on", file=sys.stderr)
"""


@pytest.fixture
def half_view() -> View:
    return halfway()


@pytest.fixture(scope="module")
def run_events() -> list[Event]:
    return list(events_of_a_run())


def test_a_step_is_one_line_that_grep_can_use(half_view: View) -> None:
    last = half_view.recent[-1]
    view = replace(half_view, recent=(*half_view.recent[:-1], replace(last, loss=1.31, grad_norm=0.42)))
    assert step_line(view) == (
        "step 176/282  loss 1.310  held-out 1.248  lr 6.2e-5  grad 0.42  4,133 tok/s  peak 4.8 GiB of 8.0 GiB"
        "  left 7 min"
    )


def test_several_ranks_are_told_with_what_they_hold_and_wait(half_view: View) -> None:
    view = replace(half_view, ranks=RanksStanding(176, (2**30, 3 * 2**29), (0.04, 1.25)))
    assert "  ranks 1.0 GiB, 1.5 GiB waited 1.2 s  left 7 min" in step_line(view)


def test_a_run_in_lines(run_events: list[Event]) -> None:
    file = io.StringIO()
    with PlainLines(file, 282) as lines:
        for event in run_events:
            lines(event)
    written = file.getvalue().splitlines()
    assert written[0] == "loading Qwen/Qwen3-4B-Instruct"
    assert written[1] == "base: held-out 2.113, shared words 0.181 on 100 rows (41 s)"
    assert "step 56/282  held-out 1.647 → 1.424, best so far" in written
    assert sum("  loss " in line for line in written) == sum(isinstance(event, StepDone) for event in run_events)
    assert written[-2] == "step 282/282  adapter saved (66 MiB, 0.4 s)"
    assert not any("\x1b" in line for line in written)


def test_a_log_in_a_poorer_encoding_gets_what_it_can_hold(run_events: list[Event]) -> None:
    raw = io.BytesIO()
    with PlainLines(io.TextIOWrapper(raw, encoding="ascii"), 282) as lines:
        for event in run_events[:70]:
            lines(event)
    assert b"held-out 1.6" in raw.getvalue()


def test_a_reader_that_goes_away_does_not_end_the_run() -> None:
    run = subprocess.Popen(
        [sys.executable, "-c", READER_GOES_AWAY],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert run.stdin is not None
    assert run.stdout is not None
    assert run.stderr is not None
    assert run.stdout.readline() == "one\n"
    run.stdout.close()
    run.stdin.write("\n")
    run.stdin.close()
    assert run.stderr.read() == "the run went on\n"
    assert run.wait(timeout=20) == 0
    run.stderr.close()
