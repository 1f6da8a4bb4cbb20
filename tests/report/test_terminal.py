"""The dashboard in a real pseudo-terminal, its output played by a terminal emulator."""

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pyte
import pytest

RUN = """
import runpy, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
from rich.console import Console
from qtune.events import StepDone, Stopping
from qtune.commands.terminal import listener_for
from qtune.report.dashboard import Dashboard

events = runpy.run_path(sys.argv[1])["events_of_a_run"]
listener = listener_for(Console(), "medical", 282)
assert isinstance(listener, Dashboard) == (sys.argv[2] != "dumb"), listener
print("before the run")
with listener as dashboard:
    for event in events():
        dashboard(event)
        if isinstance(event, StepDone) and event.step == 176:
            if sys.argv[2] == "fault":
                raise RuntimeError("the card fell off the bus")
            if sys.argv[2] == "stop":
                signal.signal(signal.SIGINT, lambda *args: dashboard(Stopping("Ctrl-C", drops=False)))
            if sys.argv[2] in ("wait", "stop"):
                time.sleep(30)
print("after the run")
"""
ALTERNATE_SCREEN = re.compile(rb"(\x1b\[\?1049[hl])")


class Terminal:
    """A pseudo-terminal with a process in it; what it draws on the second screen and on the first is kept apart."""

    def __init__(self, columns: int, lines: int, how: str, **environment: str):
        self.master, slave = pty.openpty()
        self.resize(columns, lines)
        known = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
        made_events = Path(__file__).parent.parent / "support/made_events.py"
        self.process = subprocess.Popen(
            [sys.executable, "-c", RUN, str(made_events), how],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env={**known, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8", **environment},
        )
        os.close(slave)
        self.output = b""

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.columns, self.lines = columns, lines

    def read_until(self, enough: Callable[[], bool], seconds: float = 20.0) -> None:
        until = time.monotonic() + seconds
        while not enough():
            assert time.monotonic() < until, self.output[-3000:].decode(errors="replace")
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    piece = os.read(self.master, 65_536)
                except OSError:  # how Linux says that the last process has closed the terminal
                    return
                if not piece:
                    return
                self.output += piece

    def read_to_the_end(self) -> int:
        self.read_until(lambda: False)
        return self.process.wait(timeout=10)

    def screens(self) -> tuple[pyte.Screen, pyte.Screen]:
        """The first screen, and the second as it was last seen. Both are as large as the terminal is now."""
        first, second = pyte.Screen(self.columns, 200), pyte.Screen(self.columns, self.lines)
        first_stream, second_stream = pyte.ByteStream(first), pyte.ByteStream(second)
        on_second = False
        for piece in ALTERNATE_SCREEN.split(self.output):
            if ALTERNATE_SCREEN.fullmatch(piece):
                on_second = piece.endswith(b"h")
            else:
                (second_stream if on_second else first_stream).feed(piece)
        return first, second

    @property
    def cursor_is_shown(self) -> bool:
        return self.output.rfind(b"\x1b[?25h") >= self.output.rfind(b"\x1b[?25l")

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=10)
        os.close(self.master)


@pytest.fixture
def terminal(request: pytest.FixtureRequest) -> Callable[..., Terminal]:
    def start(columns: int, lines: int, how: str, **environment: str) -> Terminal:
        made = Terminal(columns, lines, how, **environment)
        request.addfinalizer(made.close)
        return made

    return start


def text_of(screen: pyte.Screen) -> str:
    return "\n".join(line.rstrip() for line in screen.display).strip()


def whole_picture(terminal: Terminal) -> Callable[[], bool]:
    """True once the second screen shows the step that the run waits at, and nothing more is coming."""

    def is_there() -> bool:
        is_quiet = not select.select([terminal.master], [], [], 0.3)[0]
        return is_quiet and "step 176 of 282" in text_of(terminal.screens()[1])

    return is_there


@pytest.mark.parametrize(("columns", "lines"), [(80, 24), (120, 40), (40, 20)])
def test_a_run_leaves_its_last_picture_once_and_the_cursor_shown(
    terminal: Callable[..., Terminal], columns: int, lines: int
) -> None:
    run = terminal(columns, lines, "through")
    assert run.read_to_the_end() == 0
    text = text_of(run.screens()[0])
    assert text.startswith("before the run\nmedical\n")
    assert text.endswith("after the run")
    assert text.count("step 282 of 282") == 1
    assert len(text.splitlines()) <= lines + 1
    assert run.cursor_is_shown


@pytest.mark.parametrize(("columns", "lines"), [(80, 24), (120, 40), (40, 20)])
def test_mid_run_the_picture_fills_the_screen_and_no_more(
    terminal: Callable[..., Terminal], columns: int, lines: int
) -> None:
    run = terminal(columns, lines, "wait")
    run.read_until(whole_picture(run))
    text = text_of(run.screens()[1])
    assert text.startswith("medical\n")
    assert "peak 4.8 GiB of 8.0 GiB" in text
    assert not run.cursor_is_shown


def test_a_resize_mid_run_is_followed_and_leaves_no_debris(terminal: Callable[..., Terminal]) -> None:
    run = terminal(120, 40, "wait")
    run.read_until(whole_picture(run))
    for columns, lines in ((80, 24), (132, 50), (40, 20)):
        run.resize(columns, lines)
        run.output = b"\x1b[?1049h\x1b[?25l"
        run.read_until(whole_picture(run))
        rows = text_of(run.screens()[1]).splitlines()
        assert rows[0] == "medical"
        assert len(rows) <= lines
        assert sum("step 176 of 282" in row for row in rows) == 1


def test_a_fault_leaves_a_clean_screen_and_its_message(terminal: Callable[..., Terminal]) -> None:
    run = terminal(80, 24, "fault")
    assert run.read_to_the_end() == 1
    text = text_of(run.screens()[0])
    assert text.count("step 176 of 282") == 1
    assert text.endswith("RuntimeError: the card fell off the bus")
    assert run.cursor_is_shown


def test_ctrl_c_leaves_a_clean_screen(terminal: Callable[..., Terminal]) -> None:
    run = terminal(80, 24, "wait")
    run.read_until(whole_picture(run))
    os.kill(run.process.pid, signal.SIGINT)
    assert run.read_to_the_end() != 0
    text = text_of(run.screens()[0])
    assert text.count("step 176 of 282") == 1
    assert text.endswith("KeyboardInterrupt")
    assert run.cursor_is_shown


@pytest.mark.parametrize(("columns", "lines"), [(80, 24), (120, 40), (40, 20)])
def test_what_ctrl_c_does_is_said_at_once_and_the_picture_stays_whole(
    terminal: Callable[..., Terminal], columns: int, lines: int
) -> None:
    """The terminal's own ^C stood in the picture, pushed it up a line, and was all that was said."""
    run = terminal(columns, lines, "stop")
    run.read_until(whole_picture(run))
    os.write(run.master, b"\x03\n\n")  # no job control here, so it is echoed and sends no signal
    os.kill(run.process.pid, signal.SIGINT)
    run.read_until(lambda: "finishing this step, then saving" in text_of(run.screens()[1]))
    assert text_of(run.screens()[1]).startswith("medical\n")
    assert b"^C" not in run.output
    run.process.kill()


def test_what_is_typed_is_shown_again_when_the_run_is_over(terminal: Callable[..., Terminal]) -> None:
    run = terminal(80, 24, "through")
    run.read_until(lambda: b"\x1b[?1049h" in run.output)
    run.read_until(lambda: b"after the run" in run.output)
    assert termios.tcgetattr(run.master)[3] & termios.ECHO


def test_a_clock_ticks_while_nothing_happens(terminal: Callable[..., Terminal]) -> None:
    """Steps of a minute looked as if they hung."""
    run = terminal(80, 24, "wait")

    def clocks() -> tuple[str, ...]:
        found = re.findall(r"(?:elapsed|this step) (0:\d\d:\d\d)", text_of(run.screens()[1]))
        return tuple(found) if len(found) == 2 else ()

    run.read_until(lambda: bool(clocks()))
    first = clocks()
    run.read_until(lambda: all(now > then for then, now in zip(first, clocks() or first, strict=True)))


def test_no_color_draws_without_colour_and_loses_nothing(terminal: Callable[..., Terminal]) -> None:
    run = terminal(80, 24, "wait", NO_COLOR="1")
    run.read_until(whole_picture(run))
    assert not re.search(rb"\x1b\[[0-9;]*3[0-7][;m]", run.output)
    text = text_of(run.screens()[1])
    for mark in ("◆", "█", "▓", "▚", "▒", "░", "╱", "┃"):
        assert mark in text


def test_a_dumb_terminal_gets_plain_lines(terminal: Callable[..., Terminal]) -> None:
    run = terminal(80, 24, "dumb", TERM="dumb")
    assert run.read_to_the_end() == 0
    assert b"\x1b" not in run.output
    assert b"step 282/282  loss " in run.output
