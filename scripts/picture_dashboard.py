#!/usr/bin/env python3
"""Draw the dashboard of a run as it looked at one moment: SVG, and PNG where rsvg-convert (librsvg2-bin) is there.

    scripts/picture_dashboard.py runs/medical-... docs/dashboard [--at 0.7]

The picture is made from the run's own events, by the code that draws the live view.
"""

import argparse
import html
import io
import re
import shutil
import subprocess
from datetime import datetime
from functools import reduce
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import DIMMED_MONOKAI as THEME

from qtune.events import MemoryMeasured, StepDone
from qtune.report.dashboard import render
from qtune.report.dashboard_state import View, advance
from qtune.rundir import RunDir, read_json


def replay(run: RunDir, fraction: float) -> View:
    """The run's view after `fraction` of its steps."""
    plan, events = read_json(run.plan), list(run.events())
    until, now = fraction * plan["steps"], datetime.now()
    ended = next((i for i, event in enumerate(events) if isinstance(event, StepDone) and event.step > until), None)
    memory = [event for event in events if isinstance(event, MemoryMeasured) and event.step <= until]
    shown = [event for event in events[:ended] if not isinstance(event, MemoryMeasured)]
    return reduce(
        lambda view, event: advance(view, event, now), [*shown, *memory[-1:]], View(run.path.name, plan["steps"])
    )


def place_each_character(drawing: str) -> str:
    """rich gives each text a width, which librsvg ignores: put every character on the grid of 12.2 units instead."""

    def place(match: re.Match[str]) -> str:
        before, x, after, text = match.groups()
        after = re.sub(r' textLength="[^"]*"', "", after)
        return "".join(
            f'<text{before} x="{float(x) + 12.2 * column:.1f}"{after}>{html.escape(char)}</text>'
            for column, char in enumerate(html.unescape(text))
            if char not in " \xa0"
        )

    return re.sub(r'<text( class="[^"]*") x="([\d.]+)"( y[^>]*)>([^<]*)</text>', place, drawing)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("target", type=Path, help="file name without a suffix")
    parser.add_argument("--at", type=float, default=0.7, help="fraction of the steps")
    parser.add_argument("--columns", type=int, default=120)
    parser.add_argument("--rows", type=int, default=24)
    options = parser.parse_args()
    console = Console(record=True, width=options.columns, height=options.rows, force_terminal=True, file=io.StringIO())
    console.print(render(replay(RunDir.open(options.run), options.at), options.columns, options.rows - 1))
    options.target.parent.mkdir(parents=True, exist_ok=True)
    svg = options.target.with_suffix(".svg")
    drawing = console.export_svg(title=f"qtune run {options.run.name}", theme=THEME)
    svg.write_text(place_each_character(drawing.replace("Fira Code", "DejaVu Sans Mono")), encoding="utf-8")
    if shutil.which("rsvg-convert"):
        subprocess.run(["rsvg-convert", "--zoom", "1.2", svg, "-o", options.target.with_suffix(".png")], check=True)


if __name__ == "__main__":
    main()
