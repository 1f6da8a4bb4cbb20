"""A run without a terminal: one plain line per log step, with the names of metrics.jsonl, easy to grep."""

from types import TracebackType
from typing import IO

from rich.console import Console

from qtune.events import Event, StepDone
from qtune.report.progress import Progress
from qtune.units import GIB, format_rate, format_seconds


class PlainLines:
    """A listener that prints; a reader that went away does not end the run."""

    def __init__(self, console: Console, name: str, steps: int):
        self.progress = Progress(name, steps)
        self.file: IO[str] | None = console.file

    def __enter__(self) -> "PlainLines":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def __call__(self, event: Event) -> None:
        self.progress.add(event)
        line = step_line(self.progress) if isinstance(event, StepDone) else self.progress.sentence(event)
        if line and self.file is not None:
            try:
                print(line, file=self.file, flush=True)
            except BrokenPipeError:
                self.file = None


def step_line(progress: Progress) -> str:
    """`step 120/282  loss 1.310  held-out 1.42  lr 1.8e-4  4,213 tok/s  peak 4.9/11.1 GiB  left 23 min`."""
    step = progress.last
    assert step is not None
    parts = [f"step {step.step}/{progress.steps}", f"loss {step.loss:.3f}"]
    if progress.held_out:
        parts.append(f"held-out {progress.held_out[-1][1]:.3f}")
    parts += [f"lr {format_rate(step.learning_rate)}", f"grad {step.grad_norm:.2f}"]
    parts.append(f"{progress.tokens_per_second:,.0f} tok/s")
    if progress.memory:
        parts.append(f"peak {progress.memory.peak_bytes / GIB:.1f}/{progress.memory.total_bytes / GIB:.1f} GiB")
    if progress.seconds_left is not None:
        parts.append(f"left {format_seconds(progress.seconds_left)}")
    return "  ".join(parts)
