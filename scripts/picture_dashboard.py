#!/usr/bin/env python3
"""Draw the dashboard of a run as it looked at one moment: SVG, and PNG where rsvg-convert (librsvg2-bin) is there.

    scripts/picture_dashboard.py runs/medical-... docs/dashboard [--at 0.7]

The picture is made from the run's own events, by the code that draws the live view.
"""

import argparse
import shutil
import subprocess
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI

from qtune.events import MemoryMeasured, StepDone
from qtune.report.dashboard import render
from qtune.report.progress import Progress
from qtune.rundir import RunDir, read_json


def replay(run: RunDir, fraction: float) -> Progress:
    """The run's progress after `fraction` of its steps."""
    progress = Progress(read_json(run.lock)["name"], read_json(run.plan)["steps"])
    until = fraction * progress.steps
    for event in run.events():
        if isinstance(event, (StepDone, MemoryMeasured)) and event.step > until:
            continue
        if getattr(event, "step", 0) <= until:
            progress.add(event)
    return progress


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("target", type=Path, help="file name without a suffix")
    parser.add_argument("--at", type=float, default=0.7, help="fraction of the steps")
    parser.add_argument("--columns", type=int, default=120)
    parser.add_argument("--rows", type=int, default=24)
    options = parser.parse_args()
    console = Console(record=True, width=options.columns, height=options.rows, force_terminal=True, file=Path("/dev/null").open("w"))
    console.print(render(replay(RunDir.open(options.run), options.at), options.columns, options.rows - 1))
    options.target.parent.mkdir(parents=True, exist_ok=True)
    svg = options.target.with_suffix(".svg")
    drawing = console.export_svg(title=f"qtune run {options.run.name}", theme=MONOKAI)
    svg.write_text(drawing.replace("Fira Code", "DejaVu Sans Mono"), encoding="utf-8")
    if shutil.which("rsvg-convert"):
        subprocess.run(["rsvg-convert", "--zoom", "1.2", svg, "-o", options.target.with_suffix(".png")], check=True)


if __name__ == "__main__":
    main()
