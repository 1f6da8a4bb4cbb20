"""The live dashboard: events in, a picture of the run out. It is a listener and knows nothing of the trainer."""

import termios
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timedelta
from types import TracebackType
from typing import IO, Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from qtune.events import Event
from qtune.report import braille_plot, memory_bar
from qtune.report.dashboard_state import View, advance
from qtune.report.wording import by_rank, finite, format_duration, format_loss, format_norm, one_line
from qtune.units import counted, format_count, format_percent, format_rate

LEAST_PAUSE_SECONDS = 0.25
DRAWING_FRACTION = 0.008
TWO_COLUMNS_FROM = 110
SIDE_WIDTHS = (40, 54)
LEAST_CURVE_LINES, MOST_CURVE_LINES = 6, 32
MOST_EVENT_LINES, MOST_EVENT_LINES_STACKED = 8, 3
LEAST_EVENT_COLUMNS = 20
LEAST_WAIT_FRACTION = 0.01
LEAST_STEP_SECONDS = 2.0  # a clock beside shorter steps would only flicker
LEAST_HELD_OUT_RISES = 2
LOCAL_FLAGS = 3  # where termios.tcgetattr has c_lflag


class Dashboard:
    """Draws the run on the terminal's second screen, and leaves the last picture on the first when it ends.

    An event costs no more than a new view. A thread draws, at most four times a second and for at most a hundredth of
    the time, whatever the width of the terminal and the speed of the machine.
    """

    def __init__(self, title: str, steps: int, console: Console):
        self._view = View(title, steps, began_at=datetime.now())
        self._echo = ExitStack()
        self._console = console
        self._ended = threading.Event()
        self._painter = threading.Thread(target=self._keep_painting, name="dashboard", daemon=True)
        self._live = Live(console=console, screen=True, auto_refresh=False, get_renderable=self._picture)

    def __call__(self, event: Event) -> None:
        self._view = advance(self._view, event, datetime.now())

    def __enter__(self) -> Self:
        self._echo.enter_context(no_echo(self._console.file))
        self._live.start()
        self._painter.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        with suppress(OSError):  # the terminal may be gone; the run is not the worse for it
            self._painter.join()
            self._live.stop()
            self._console.print(self._picture())
        self._echo.close()

    def _picture(self) -> RenderableType:
        # One line is left for the prompt that follows the last picture.
        return render(self._view, self._console.width, self._console.height - 1, datetime.now())

    def _keep_painting(self) -> None:
        pause, painted = 0.0, None
        while not self._ended.wait(pause):
            began, looks_like = time.thread_time(), (self._view, self._console.size, int(time.time()))
            if looks_like != painted:
                try:
                    self._live.refresh()
                except OSError:
                    return
            painted = looks_like
            pause = max(LEAST_PAUSE_SECONDS, (time.thread_time() - began) / DRAWING_FRACTION)


def render(view: View, width: int, height: int, now: datetime | None = None) -> Text:
    """The picture of `view` at `now`, in at most `width` x `height` cells; without a `now` as of its last event.
    What there is no room for is left out whole: events first, then the names of the memory's parts, then the memory."""
    now = now or view.changed_at
    head = _head(view, width, now)
    if width >= TWO_COLUMNS_FROM:
        low, high = SIDE_WIDTHS
        side_width = max(low, min(high, width * 2 // 5))
        left_width, room = width - side_width - 3, height - len(head) - 1
        right = _side(view, side_width, room, now)
        left = _loss(view, left_width, min(MOST_CURVE_LINES, max(len(right), room) - 1))
        body = _beside(left, right, left_width + 3)
    else:
        body = _stack(view, width, height - len(head) - 1)
    lines = [*head, Text(), *body] if height > len(head) else head
    for line in lines:
        line.truncate(width, overflow="ellipsis")
    text = Text("\n", no_wrap=True, overflow="crop").join(lines[: max(1, height)])
    text.no_wrap, text.overflow = True, "crop"
    return text


def _stack(view: View, width: int, room: int) -> list[Text]:
    """One column: the loss, the memory, the events, as far as `room` lines reach."""
    bar_lines, legend = _memory_bar(view, width), _flow(_legend_items(view), width)
    room -= LEAST_CURVE_LINES + 1
    memory: list[Text] = []
    if bar_lines and room > len(bar_lines):
        memory = [Text(), *bar_lines, *(legend if room > len(bar_lines) + len(legend) else [])]
    room -= len(memory)
    events = _events(view, width, min(MOST_EVENT_LINES_STACKED, room - 1))
    room -= len(events) + 1 if events else 0
    loss = _loss(view, width, min(MOST_CURVE_LINES, LEAST_CURVE_LINES + max(0, room)))
    return [*loss, *memory, *([Text(), *events] if events else [])]


def _side(view: View, width: int, room: int, now: datetime | None) -> list[Text]:
    """The right column of two: numbers, memory by part, events."""
    lines = [_heading(Text("now", "bold"), Text(), width), *_table(_numbers(view, now), width)]
    bar_lines = _memory_bar(view, width)
    if bar_lines and len(lines) + 1 + len(bar_lines) <= room:
        lines += [Text(), *bar_lines]
        legend = _legend_rows(view, width)
        if len(lines) + len(legend) <= room:
            lines += legend
    events = _events(view, width, min(MOST_EVENT_LINES, room - len(lines) - 2))
    if events:
        lines += [Text(), _heading(Text("events", "bold"), Text(), width), *events]
    return lines


def _head(view: View, width: int, now: datetime | None) -> list[Text]:
    """The name of the run, the progress bar, and on a narrow terminal the numbers beside it."""
    fraction = min(1.0, max(0.0, view.step / view.steps)) if view.steps > 0 else 0.0
    done = f" step {view.step:,} of {view.steps:,}  {100 * fraction:.0f} %"
    length = max(0, width - len(done))
    filled = round(length * fraction)
    progress = Text.assemble(("━" * filled, "cyan"), ("─" * (length - filled), "dim"), done)
    head = [Text(one_line(view.title), "bold"), progress]
    if view.stopping:
        head.append(Text(view.stopping, "bold yellow"))
    if width < TWO_COLUMNS_FROM:
        head += _flow([Text.assemble((f"{name} ", "dim"), value) for name, value in _numbers(view, now)], width)
    return head


def _numbers(view: View, now: datetime | None) -> list[tuple[str, Text]]:
    """(name, value) of what moves from step to step, and of the clocks."""
    last = view.last
    if last is None:
        return [("left", Text("not known before the first steps")), *_clocks(view, now)]
    numbers = [*([] if view.finished else [("left", _time_left(view))]), *_clocks(view, now)]
    if (pace := view.tokens_per_second) is not None:
        numbers.append(("tokens/s", Text(finite(format_count, pace))))
    numbers += [
        ("lr", Text(finite(format_rate, last.learning_rate))),
        ("grad", Text(format_norm(last.grad_norm))),
        ("epoch", Text(f"{last.epoch:.2f}")),
    ]
    if view.wait_fraction >= LEAST_WAIT_FRACTION:
        numbers.append(("waiting for data", Text(format_percent(view.wait_fraction), "yellow")))
    if view.ranks is not None:
        numbers += [(f"rank {rank}", Text(told)) for rank, told in enumerate(by_rank(view.ranks))]
    return numbers


def _clocks(view: View, now: datetime | None) -> list[tuple[str, Text]]:
    """How long the run has taken in this process, and what is being done."""
    if view.began_at is None or now is None:
        return []
    clocks = [("elapsed", _clock(now - view.began_at))]
    waited = now - (view.changed_at or view.began_at)
    training = view.last if not view.finished else None
    if max(waited.total_seconds(), training.step_seconds if training else 0.0) >= LEAST_STEP_SECONDS:
        clocks.append(("this step" if training else "on this", _clock(waited)))
    return clocks


def _clock(time: timedelta) -> Text:
    return Text(str(timedelta(seconds=int(time.total_seconds()))))


def _time_left(view: View) -> Text:
    left, done_at = view.seconds_left, view.done_at
    if left is None or done_at is None or view.changed_at is None:
        return Text("not known yet")
    is_today = done_at.date() == view.changed_at.date()
    is_this_week = done_at - view.changed_at < timedelta(days=6)
    clock = f"{done_at:%H:%M}" if is_today else f"{done_at:%a %H:%M}" if is_this_week else f"{done_at:%d %b %Y}"
    return Text(f"{format_duration(left)}, done at {clock}")


def _loss(view: View, width: int, height: int) -> list[Text]:
    """A heading with the last values, and the curve in `height` lines below it."""
    now = Text("loss", "bold")
    if view.last is not None:
        now.append(f" {format_loss(view.last.loss)}")
    points = [(float(each.step), each.loss) for each in view.held_out]
    lines = braille_plot.draw(view.losses, points, width, height)
    return [_heading(now, _held_out_facts(view), width), *(lines or [Text("no step yet", "dim")])]


def _held_out_facts(view: View) -> Text:
    """What a person would act on: the best held-out loss, and a loss that goes the wrong way."""
    facts = []
    if view.held_out_rises >= LEAST_HELD_OUT_RISES:
        facts.append(Text(f"held-out rose {view.held_out_rises} times in a row", "yellow"))
    elif (steps := braille_plot.rising_steps(view.losses)) > 0:
        facts.append(Text(f"rising for {counted(steps, 'step')}", "yellow"))
    if view.best is not None:
        facts.append(
            Text.assemble(
                (braille_plot.BEST_MARK, braille_plot.BEST_STYLE),
                f" best held-out {format_loss(view.best.loss)}",
                (f" at step {view.best.step:,}"),
            )
        )
    return Text("  ").join(facts)


def _memory_bar(view: View, width: int) -> list[Text]:
    if view.memory is None:
        return []
    name, peak = Text(memory_bar.title(view.memory), "bold"), memory_bar.peak(view.memory)
    stacked = memory_bar.stacked(view.memory, width)
    if name.cell_len + peak.cell_len + 3 <= width:
        return [_heading(name, peak, width), stacked]
    return [_heading(name, Text(), width), stacked, peak]


def _legend_items(view: View) -> list[Text]:
    if view.memory is None:
        return []
    return [Text.assemble(fill, f" {name} ", (size, "bold")) for fill, name, size in memory_bar.legend(view.memory)]


def _legend_rows(view: View, width: int) -> list[Text]:
    if view.memory is None:
        return []
    return [
        Text.assemble(fill, f" {name}", " " * max(1, width - len(name) - len(size) - 2), size)
        for fill, name, size in memory_bar.legend(view.memory)
    ]


def _events(view: View, width: int, most: int) -> list[Text]:
    """The last sentences in at most `most` lines, newest at the bottom, each with the step it belongs to."""
    if most < 1:
        return []
    margin = max((len(f"{step:,}") for step, _ in view.messages), default=0) + 2
    lines: list[Text] = []
    for step, sentence in reversed(view.messages):
        pieces = textwrap.wrap(sentence, max(LEAST_EVENT_COLUMNS, width - margin), max_lines=most, placeholder=" …")
        if len(lines) + len(pieces) > most:
            break
        starts = [f"{step:,}  ".rjust(margin), *[" " * margin] * (len(pieces) - 1)]
        lines = [Text.assemble((start, "dim"), piece) for start, piece in zip(starts, pieces, strict=True)] + lines
    return lines


def _heading(left: Text, right: Text, width: int) -> Text:
    """`left ───────── right`, with facts that do not fit beside the name left to be cut at the edge."""
    fill = width - left.cell_len - right.cell_len - (2 if right.cell_len else 1)
    rule = Text.assemble(left, (f" {'─' * max(1, fill)}", "dim"))
    return Text.assemble(rule, " ", right) if right.cell_len else rule


def _table(rows: Sequence[tuple[str, Text]], width: int) -> list[Text]:
    """Names to the left, values to the right."""
    return [
        Text.assemble((name, "dim"), " " * max(1, width - len(name) - value.cell_len), value) for name, value in rows
    ]


def _flow(items: Sequence[Text], width: int, gap: int = 3) -> list[Text]:
    """Items one after the other, on as many lines as they need."""
    lines: list[Text] = []
    for item in items:
        if lines and lines[-1].cell_len + gap + item.cell_len <= width:
            lines[-1].append(" " * gap).append_text(item)
        else:
            lines.append(item.copy())
    return lines


def _beside(left: Sequence[Text], right: Sequence[Text], start: int) -> list[Text]:
    """Two columns, the right one from cell `start` on."""
    lines = []
    for row in range(max(len(left), len(right))):
        line = Text().append_text(left[row]) if row < len(left) else Text()
        if row < len(right):
            line.truncate(start - 1, overflow="ellipsis")
            line.append(" " * (start - line.cell_len)).append_text(right[row])
        lines.append(line)
    return lines


@contextmanager
def no_echo(file: IO[str]) -> Iterator[None]:
    """A terminal that does not print what is typed, such as the ^C of a Ctrl-C, into the picture.

    Signals are sent as ever. What is no terminal, or is gone, is left alone."""
    before = None
    with suppress(OSError, ValueError, termios.error):
        before = termios.tcgetattr(file.fileno())
        quiet = [*before[:LOCAL_FLAGS], before[LOCAL_FLAGS] & ~termios.ECHO, *before[LOCAL_FLAGS + 1 :]]
        termios.tcsetattr(file.fileno(), termios.TCSANOW, quiet)
    try:
        yield
    finally:
        if before is not None:
            with suppress(OSError, ValueError, termios.error):
                termios.tcsetattr(file.fileno(), termios.TCSANOW, before)
