"""The live view of a run: loss, memory by part, progress, and what happened last."""

import time
from collections.abc import Iterable
from datetime import datetime, timedelta
from types import TracebackType

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from qtune.events import Event, MemoryMeasured
from qtune.report import curve
from qtune.report.plain import PlainLines
from qtune.report.progress import Progress
from qtune.units import format_bytes, format_rate, format_seconds

SECONDS_BETWEEN_FRAMES = 0.5
WIDE_COLUMNS, LEGEND_COLUMNS = 100, 27
# One colour and one fill a part, the same wherever it is drawn; the fills tell them apart without colour.
LOOK_BY_PART = {
    "python and libraries": ("░", "dim"),
    "context": ("░", "dim"),
    "base": ("█", "blue"),
    "adapter": ("▓", "green"),
    "gradients": ("▒", "green"),
    "optimizer": ("▚", "green"),
    "activations and workspace": ("▞", "yellow"),
}


def listener_for(console: Console, name: str, steps: int) -> "Dashboard | PlainLines":
    """The dashboard on a terminal that can move its cursor, plain lines anywhere else."""
    if console.is_terminal and not console.is_dumb_terminal:
        return Dashboard(console, name, steps)
    return PlainLines(console, name, steps)


class Dashboard:
    """A listener and a context manager; the last frame stays on the screen, whatever ended the run."""

    def __init__(self, console: Console, name: str, steps: int):
        self.progress = Progress(name, steps)
        self.live = Live(Frame(self.progress), console=console, auto_refresh=False, vertical_overflow="crop")
        self.drawn_at = 0.0

    def __enter__(self) -> "Dashboard":
        self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.refresh()
        self.live.stop()

    def __call__(self, event: Event) -> None:
        self.progress.add(event)
        now = time.monotonic()
        if now - self.drawn_at >= SECONDS_BETWEEN_FRAMES:
            self.drawn_at = now
            self.live.refresh()


class Frame:
    """One moment of a run, drawn to whatever size the terminal has now."""

    def __init__(self, progress: Progress):
        self.progress = progress

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield render(self.progress, options.max_width, console.size.height - 1)


def render(progress: Progress, width: int, height: int) -> RenderableType:
    """The whole view in at most `height` lines; what matters least goes first when there is little room."""
    figures, memory = _figures(progress, width), progress.memory
    if width >= WIDE_COLUMNS:
        side = width // 2
        rows = max(4, min(14, height - len(figures) - 4))
        right = [*_memory(memory, width - side - 4), Text(""), *_said(progress, rows)][:rows]
        columns = Table.grid(expand=True)
        columns.add_column(width=side)
        columns.add_column()
        columns.add_row(
            _panel(_loss_title(progress), _loss(progress, side - 4, rows), rows), _panel("memory", right, rows)
        )
        return Group(*figures, columns)
    spare = height - len(figures) - 2
    bar = _memory(memory, width - 4)
    said = _said(progress, 3)
    with_memory = spare - len(bar) - 2 >= 3
    with_said = with_memory and spare - len(bar) - 2 - len(said) >= 5
    rows = spare - (len(bar) + 2 if with_memory else 0) - (len(said) if with_said else 0)
    rows = max(1, min(12, rows))
    parts: list[RenderableType] = [*figures, _panel(_loss_title(progress), _loss(progress, width - 4, rows), rows)]
    if with_memory:
        parts.append(_panel("memory", bar, len(bar)))
    if with_said:
        parts += said
    return Group(*parts)


def _panel(title: str, lines: list[Text], rows: int) -> Panel:
    return Panel(Group(*lines), title=title, title_align="left", border_style="dim", height=rows + 2)


def _figures(progress: Progress, width: int) -> list[Text]:
    """The progress bar and the numbers, one line each where they fit."""
    left = progress.seconds_left
    head = f"{progress.name}  step {progress.step:,} of {progress.steps:,}  "
    until = ""
    if left is not None:
        until = f"  {format_seconds(left)} left, until {datetime.now() + timedelta(seconds=left):%H:%M}"
    bar = _bar(progress.step / max(1, progress.steps), max(4, min(50, width - len(head) - len(until))))
    lines = [_cut(Text.assemble((head, "bold"), bar, until), width)]
    if progress.last:
        last = progress.last
        numbers = [
            f"epoch {last.epoch:.2f}",
            f"lr {format_rate(last.learning_rate)}",
            f"grad {last.grad_norm:.2f}",
            f"{progress.tokens_per_second:,.0f} tok/s",
            progress.waiting,
        ]
        lines.append(_cut(Text("  ".join(part for part in numbers if part)), width))
    return lines


def _bar(fraction: float, columns: int) -> Text:
    done = round(min(1.0, fraction) * columns)
    return Text.assemble(("━" * done, "green"), ("─" * (columns - done), "dim"))


def _cut(text: Text, width: int) -> Text:
    text.truncate(width, overflow="ellipsis")
    return text


def _loss_title(progress: Progress) -> str:
    if not progress.last:
        return "loss"
    parts = [f"loss {progress.last.loss:.3f}"]
    if progress.best_held_out is not None:
        parts.append(f"◆ held-out {progress.held_out[-1][1]:.3f}, best {progress.best_held_out:.3f}")
    return "   ".join([*parts, progress.trend]).strip()


def _loss(progress: Progress, columns: int, rows: int) -> list[Text]:
    return curve.draw(progress.losses, progress.held_out, progress.steps, columns, rows)


def _memory(memory: MemoryMeasured | None, columns: int) -> list[Text]:
    """The stacked bar against the whole device, what it stands for, and the peak."""
    if memory is None:
        return [Text("not measured yet", style="dim")]
    on_host = memory.parts[0][0] == "python and libraries"
    where = "this machine's RAM (no GPU is used)" if on_host else "the card"
    head = f"peak {format_bytes(memory.peak_bytes)} of {format_bytes(memory.total_bytes)}, {where}"
    return [_cut(Text(head), columns), memory_bar(memory, columns), *_legend(memory, columns)]


def memory_bar(memory: MemoryMeasured, columns: int) -> Text:
    """Every part that holds anything gets at least a cell; the peak is marked, the rest of the device is free."""
    cells = [(name, max(1, round(columns * size / memory.total_bytes))) for name, size in memory.parts if size]
    text = Text()
    for name, count in cells:
        fill, style = LOOK_BY_PART.get(name, ("█", ""))
        text.append(fill * count, style=style)
    text.truncate(columns - 1)
    text.append("▏", style="red")
    text.append("·" * (columns - len(text)), style="dim")
    return text


def _legend(memory: MemoryMeasured, columns: int) -> Iterable[Text]:
    """Name and bytes of every part, as many to a line as fit."""
    entries = [*((name, size) for name, size in memory.parts if size), ("free", memory.free_bytes)]
    per_line = max(1, columns // (LEGEND_COLUMNS + 12))
    for start in range(0, len(entries), per_line):
        line = Text()
        for name, size in entries[start : start + per_line]:
            fill, style = LOOK_BY_PART.get(name, ("·", "dim"))
            line.append(f"{fill} ", style=style)
            line.append(f"{name} {format_bytes(size)}".ljust(LEGEND_COLUMNS + 10))
        line.rstrip()
        yield _cut(line, columns)


def _said(progress: Progress, most: int) -> list[Text]:
    """The last events, one line each."""
    return [Text(sentence, style="dim", no_wrap=True, overflow="ellipsis") for sentence in list(progress.said)[-most:]]
