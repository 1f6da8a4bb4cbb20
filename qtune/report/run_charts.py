"""The charts of a run's page: its loss, its memory by part, its speed, and the losses of several runs."""

from collections.abc import Sequence

from qtune.events import MemoryMeasured, StepDone
from qtune.report import braille_plot, memory_bar, svg_chart
from qtune.report.dashboard_state import Point
from qtune.report.run_record import Record
from qtune.report.svg_chart import Axis, Chart, Key, Shape
from qtune.report.wording import format_loss
from qtune.units import GIB, MIB, format_bytes, format_count

MOST_MEASUREMENTS = 240
MOST_RUNS_DRAWN = 4
HEADROOM = 1.06


def loss(found: Record) -> Chart | None:
    """Loss by step, raw and smoothed, and the held-out losses; None where there is no step."""
    points, marks = found.losses, found.held_out_losses
    if not points:
        return None
    smooth = braille_plot.smooth(points)
    x, y = _steps((*points, *marks)), svg_chart.loss_axis(points, marks)
    shapes = [
        Shape(svg_chart.dots(svg_chart.thinned(points), x, y), "raw", "loss of each step"),
        Shape(svg_chart.line(svg_chart.thinned(smooth), x, y), "smooth", "loss, smoothed"),
    ]
    keys = [Key("raw", "each step"), Key("smooth", "smoothed", format_loss(smooth[-1][1]))]
    best = found.best
    if best is not None:
        shapes.append(Shape(svg_chart.line(svg_chart.thinned(marks), x, y), "held-line", "held-out loss"))
        shapes.append(Shape(svg_chart.dots(svg_chart.thinned(marks), x, y), "held", "held-out loss"))
        shapes.append(Shape(svg_chart.dots([(best.step, best.loss)], x, y), "best", "best held-out loss"))
        keys.append(Key("held", "held-out; the best is larger", f"{format_loss(best.loss)} at step {best.step:,}"))
    return Chart(
        label=_loss_label(found),
        x=x,
        y=y,
        x_title="step",
        y_title="nats per trained token" + (", on a logarithmic axis" if y.is_log else ""),
        shapes=tuple(shapes),
        hovers=svg_chart.hovers(points, x, lambda part: _loss_told(part, marks)),
        keys=tuple(keys),
    )


def _loss_label(found: Record) -> str:
    first, last, best = found.losses[0], found.losses[-1], found.best
    ends = [f"{format_loss(value)} at step {step:,.0f}" for step, value in (first, last)]
    told = f"Loss by step: {ends[0]}, {ends[1]}"
    return f"{told}; best held-out {format_loss(best.loss)} at step {best.step:,}." if best else f"{told}."


def _loss_told(part: Sequence[Point], marks: Sequence[Point]) -> str:
    """`steps 12 to 14: loss 1.412; held-out 1.391 at step 14`."""
    first, last = part[0][0], part[-1][0]
    mean = sum(value for _, value in part) / len(part)
    steps = f"step {last:,.0f}: loss" if first == last else f"steps {first:,.0f} to {last:,.0f}: mean loss"
    held_out = "".join(
        f"; held-out {format_loss(value)} at step {step:,.0f}" for step, value in marks if first <= step <= last
    )
    return f"{steps} {format_loss(mean)}{held_out}"


def memory(found: Record) -> Chart | None:
    """Bytes by part over the measurements of a run, the peak of each, and the forecast where there is one."""
    series = _highest(found.memory_series)
    peak = found.memory
    if peak is None:
        return None
    forecast = found.forecast_bytes
    x = _measurements(series)
    high = HEADROOM * max(peak.peak_bytes, forecast or 0, *(_held(each) for each in series))
    unit, unit_name = _unit(high)
    y = svg_chart.linear_axis(0, high, unit)
    shapes, at = _parts(series, x, y), [float(i) for i in range(len(series))]
    peaks = [(i, float(each.peak_bytes)) for i, each in zip(at, series, strict=True)]
    shapes.append(Shape(svg_chart.line(peaks, x, y), "peak", "peak"))
    keys = [Key(part_style(name), name, size) for _, name, size in memory_bar.parts(peak)]
    keys.append(Key("peak", "peak", memory_bar.peak_of_total(peak)))
    if forecast is not None:
        shapes.append(Shape(svg_chart.level(forecast, y), "forecast", "forecast"))
        keys.append(Key("forecast", "forecast peak", format_bytes(forecast)))
    beside = f", forecast {format_bytes(forecast)}" if forecast is not None else ""
    return Chart(
        label=f"{memory_bar.heading(peak)} by part over the run: peak {memory_bar.peak_of_total(peak)}{beside}.",
        x=x,
        y=y,
        x_title="step",
        y_title=f"{unit_name} held, by part",
        shapes=tuple(shapes),
        hovers=svg_chart.hovers(peaks, x, lambda part: _memory_told(series[int(part[-1][0])])),
        keys=tuple(keys),
    )


def part_style(name: str) -> str:
    """The CSS classes of a part of memory: the dashboard's colour, and a shade for each part of that colour."""
    fill = memory_bar.FILLS.get(name, memory_bar.UNKNOWN)
    alike = [each for each in memory_bar.FILLS if memory_bar.FILLS[each].style == fill.style]
    shade = alike.index(name) if name in alike else len(alike)
    return f"part {fill.style} shade-{min(shade, 4)}"


def _parts(series: Sequence[MemoryMeasured], x: Axis, y: Axis) -> list[Shape]:
    """One area a part, each on top of those before it."""
    names = list(dict.fromkeys(name for each in series for name, size in each.parts if size > 0))
    shapes = []
    lower = [(float(i), 0.0) for i in range(len(series))]
    for name in names:
        sizes = [max(0, dict(each.parts).get(name, 0)) for each in series]
        upper = [(i, floor + size) for (i, floor), size in zip(lower, sizes, strict=True)]
        shapes.append(Shape(svg_chart.area(upper, lower, x, y), part_style(name), name))
        lower = upper
    return shapes


def _highest(series: Sequence[MemoryMeasured]) -> list[MemoryMeasured]:
    """At most 240 measurements: that with the highest peak of each stretch."""
    return [max(part, key=lambda each: each.peak_bytes) for part in svg_chart.stretches(series, MOST_MEASUREMENTS)]


def _held(memory: MemoryMeasured) -> int:
    return sum(max(0, size) for _, size in memory.parts)


def _memory_told(memory: MemoryMeasured) -> str:
    """`step 12, step: peak 4.8 GiB; base 2.5 GiB, adapter 126 MiB`."""
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in memory.parts if size > 0)
    return f"step {memory.step:,} ({memory.phase}): peak {format_bytes(memory.peak_bytes)}; {parts}"


def _measurements(series: Sequence[MemoryMeasured]) -> Axis:
    """One place a measurement, since several fall on a step; labelled by their steps."""
    last = len(series) - 1
    count = min(svg_chart.MOST_TICKS, len(series))
    places = sorted({round(i * last / max(1, count - 1)) for i in range(count)})
    axis = Axis(0, last)
    return Axis(0, last, False, tuple((axis.place(i), f"{series[i].step:,}") for i in places))


def _unit(high: float) -> tuple[int, str]:
    """What bytes of up to `high` are told in."""
    return (GIB, "GiB") if high >= 2 * GIB else (MIB, "MiB")


def speed(found: Record) -> Chart | None:
    """Tokens a second by step; None where no step took time."""
    points = [(float(step.step), tokens_a_second(step)) for step in found.steps if step.step_seconds > 0]
    mean = found.tokens_per_second
    if not points or mean is None:
        return None
    smooth = braille_plot.smooth(points)
    x, y = _steps(points), svg_chart.linear_axis(0, max(value for _, value in points) * HEADROOM)
    return Chart(
        label=f"Tokens a second by step: {format_count(mean)} over the whole run.",
        x=x,
        y=y,
        x_title="step",
        y_title="tokens a second",
        shapes=(
            Shape(svg_chart.dots(svg_chart.thinned(points), x, y), "raw", "each step"),
            Shape(svg_chart.line(svg_chart.thinned(smooth), x, y), "smooth", "smoothed"),
        ),
        hovers=svg_chart.hovers(
            points, x, lambda part: f"step {part[-1][0]:,.0f}: {format_count(part[-1][1])} tokens/s"
        ),
        keys=(Key("raw", "each step"), Key("smooth", "smoothed", f"{format_count(mean)} over all")),
    )


def tokens_a_second(step: StepDone) -> float:
    return step.tokens / step.step_seconds


def losses(runs: Sequence[tuple[str, Record]]) -> Chart | None:
    """The held-out losses of several runs, or where one has none their smoothed losses; None for more than four."""
    on_held_out = all(found.held_out_losses for _, found in runs)
    lines = [
        (name, found.held_out_losses if on_held_out else braille_plot.smooth(found.losses)) for name, found in runs
    ]
    points = [point for _, line in lines for point in line]
    if len(runs) > MOST_RUNS_DRAWN or not all(line for _, line in lines):
        return None
    x, y = _steps(points), svg_chart.loss_axis(points, ())
    ends = "; ".join(f"{name} {format_loss(line[-1][1])}" for name, line in lines)
    kind = "held-out loss" if on_held_out else "loss, smoothed"
    return Chart(
        label=f"{kind.capitalize()} by step, at the end: {ends}.",
        x=x,
        y=y,
        x_title="step",
        y_title=kind + (", on a logarithmic axis" if y.is_log else ""),
        shapes=tuple(
            Shape(svg_chart.line(svg_chart.thinned(line), x, y), f"run run-{i}", name)
            for i, (name, line) in enumerate(lines)
        ),
        keys=tuple(Key(f"run run-{i}", name, format_loss(line[-1][1])) for i, (name, line) in enumerate(lines)),
    )


def _steps(points: Sequence[Point]) -> Axis:
    return svg_chart.step_axis(min(step for step, _ in points), max(step for step, _ in points))
