#!/usr/bin/env python3
"""Everything that only a CUDA card can tell, in one call of at most ten minutes.

    scripts/bench_gpu.py                        the items below; figures go to benchmarks/gpu.json and gpu.md
    scripts/bench_gpu.py --items smoke,cost     some of them, or further ones
    scripts/bench_gpu.py --rehearse             the same code on the processor, tiny shapes: figures mean nothing

    machine          the card, its arithmetic and its link to the host
    smoke            does it hold on this card: what is in host memory stays there, one card is used, loading reserves
                     what it keeps, windows and grouped heads take no math kernel, memory that runs out is caught
    sanitizer        streamed layers and offloaded inputs under TORCH_CUDA_SANITIZER=1
    verbs            qtune run, resume after Ctrl-C, merge, export: exit codes and seconds
    generation       tokens a second of an answer, with weights on the card and in host memory
    cost             what each technique adds to a step and takes off its peak, off and on taking turns
    forecast_small   forecast beside measured (allocated, reserved, nvidia-smi) of the plan's own techniques at 2,048
    forecast_large   tokens, eight shapes on cards of 6 to 48 GB by torch's memory fraction
    beside_8b        tokens a second beside a plain trl script, padded and packed, within the same memory
    beside_30b       the same of a mixture of experts
    beside_unsloth   the same beside Unsloth, where it is installed

    floor_8b, floor_70b, floor_30b   the least memory at 2,048 tokens, weights resident or streamed
    lengths_8b, per_token            forecast beside measured from 512 to 32,768 tokens; bytes for a further token
    context_8gib, context_24gib      the longest context that really runs beside the forecast

Those of the second group are run where they are named: with them it is more than ten minutes. Models are of the
published shapes with random weights, which are made and quantised on the card one by one: no file is read, and the
16-bit model never exists. Every item is a process of its own with a time limit, smallest first, so that one that
crashes or runs out of memory costs the others nothing; figures are on disk as soon as a row is measured, and items for
which no time is left are named. Refuses to start without a card.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from gpu_items import beside, memory, smoke, speed, whole_run
from gpu_items.lab import RANK, Figures, Lab
from gpu_items.tables import markdown

from qtune.hardware import find_device
from qtune.model import base
from qtune.units import GIB

TOTAL_SECONDS, LEAST_SECONDS = 570, 15
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes")


@dataclass(frozen=True)
class Item:
    """A group of rows: the most seconds that it may take, and how many it should take on an H200 (reckoned from its
    arithmetic, not measured). `environment` is that of its process; one that `is_extra` runs where it is named."""

    rows: Callable[[Lab], Iterator[Figures]]
    seconds: int
    expected: int
    environment: dict[str, str] = field(default_factory=dict)
    is_extra: bool = False


ITEMS = {
    "machine": Item(speed.machine_rows, 40, 5),
    "smoke": Item(smoke.smoke_rows, 100, 45),
    "sanitizer": Item(smoke.watched_rows, 60, 15, {"TORCH_CUDA_SANITIZER": "1"}),
    "verbs": Item(whole_run.verb_rows, 150, 75),
    "generation": Item(speed.generation_rows, 60, 20),
    "cost": Item(speed.cost_rows, 90, 45),
    "forecast_small": Item(lambda lab: memory.forecast_rows(lab, memory.SMALL), 90, 60),
    "forecast_large": Item(lambda lab: memory.forecast_rows(lab, memory.LARGE), 120, 80),
    "beside_8b": Item(lambda lab: beside.trl_rows(lab, beside.DENSE), 150, 90),
    "beside_30b": Item(lambda lab: beside.trl_rows(lab, beside.MIXTURE), 120, 70),
    "beside_unsloth": Item(beside.unsloth_rows, 150, 5),  # 90 where it is installed
    "floor_8b": Item(lambda lab: memory.floor_rows(lab, "llama_8b", (False, True)), 90, 40, is_extra=True),
    "floor_70b": Item(lambda lab: memory.floor_rows(lab, "llama_70b", (True,)), 120, 90, is_extra=True),
    "floor_30b": Item(lambda lab: memory.floor_rows(lab, "qwen3_30b_a3b", (False,)), 90, 50, is_extra=True),
    "lengths_8b": Item(lambda lab: memory.length_rows(lab, "llama_8b"), 180, 120, is_extra=True),
    "per_token": Item(memory.per_token_rows, 100, 80, is_extra=True),
    "context_8gib": Item(lambda lab: memory.context_rows(lab, 8 * GIB), 150, 120, is_extra=True),
    "context_24gib": Item(lambda lab: memory.context_rows(lab, 24 * GIB), 150, 120, is_extra=True),
}


def run_item(name: str, is_rehearsed: bool, target: Path) -> None:
    """Inside an item's own process: waits for its turn; every row is on disk as soon as it is there."""
    if not sys.stdin.readline():
        return
    base.quiet_libraries()
    lab = Lab(find_device(), is_rehearsed)
    rows: list[Figures] = []
    for row in ITEMS[name].rows(lab):
        rows.append(row)
        write(target, rows)


class Apart:
    """One item in a process of its own, which has its imports behind it when its turn comes."""

    def __init__(self, name: str, is_rehearsed: bool):
        self._folder = tempfile.TemporaryDirectory()
        self._target, self._said = (Path(self._folder.name) / file for file in ("rows.json", "said.txt"))
        command = [sys.executable, __file__, "--item", name, str(self._target)]
        environment = {} if is_rehearsed else ITEMS[name].environment  # which a torch without a card does not bear
        with self._said.open("w", encoding="utf-8") as stream:
            self._process = subprocess.Popen(
                [*command, *(["--rehearse"] if is_rehearsed else [])],
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=stream,
                text=True,
                env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
            )

    def run(self, seconds: float) -> Figures:
        """What it measured, and what ended it early."""
        start, why = time.perf_counter(), None
        try:
            self._process.communicate("go\n", timeout=seconds)
            if self._process.returncode:
                why = f"exit {self._process.returncode}: {last_line(self._said)}"
        except subprocess.TimeoutExpired:
            why = f"stopped after {seconds:.0f} s"
        rows = json.loads(self._target.read_text(encoding="utf-8")) if self._target.is_file() else []
        self.end()
        return {"rows": rows, "ended_early": why, "seconds": round(time.perf_counter() - start, 1)}

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()


def run_here(name: str, is_rehearsed: bool) -> Figures:
    """The same without a process of its own, which costs no import: for rehearsals."""
    start, rows, why = time.perf_counter(), list[Figures](), None
    base.quiet_libraries()
    try:
        for row in ITEMS[name].rows(Lab(find_device(), is_rehearsed)):
            rows.append(row)
    except Exception as fault:
        traceback.print_exc()
        why = f"{type(fault).__name__}: {fault}"
    return {"rows": rows, "ended_early": why, "seconds": round(time.perf_counter() - start, 1)}


def last_line(file: Path) -> str:
    lines = [line for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][-300:] if lines else "it said nothing"


def write(target: Path, value: Any) -> None:
    """Whole, or as it was: a time limit may fall into the writing."""
    half = target.with_suffix(".half")
    half.write_text(json.dumps(value, indent=1), encoding="utf-8")
    half.replace(target)


def bench(names: Sequence[str], is_rehearsed: bool, is_apart: bool, folder: Path) -> Figures:
    """Every item in turn, as long as there is time; figures are on disk after each."""
    target = folder / ("gpu_rehearsal.json" if is_rehearsed else "gpu.json")
    report: Figures = {
        "date": date.today().isoformat(),
        "is_rehearsal": is_rehearsed,
        "card": "",
        "python": sys.version.split()[0],
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
        "settings": {"rank": RANK, "targets": "all-linear", "optimizer": "adamw_8bit where no other is named"},
        "items": {},
    }
    ends, waiting = time.monotonic() + TOTAL_SECONDS, dict[str, Apart]()
    for index, name in enumerate(names):
        if is_apart:
            waiting |= {each: Apart(each, is_rehearsed) for each in names[index : index + 2] if each not in waiting}
        left = ends - time.monotonic()
        if left < LEAST_SECONDS:
            ended: Figures = {"rows": [], "ended_early": "not begun: no time was left", "seconds": 0}
        elif is_apart:
            ended = waiting[name].run(min(ITEMS[name].seconds, left))
        else:
            ended = run_here(name, is_rehearsed)
        report["items"][name] = {**ended, "expected_seconds": ITEMS[name].expected}
        if name == "machine" and ended["rows"]:  # asked there: a context of this process would take from the card
            report["card"] = ended["rows"][0]["card"]
        write(target, report)
        print(f"{name}: {len(ended['rows'])} rows in {ended['seconds']:.0f} s; {ended['ended_early'] or 'whole'}")
    for apart in waiting.values():
        apart.end()
    target.with_suffix(".md").write_text(markdown(report), encoding="utf-8")
    return report


def is_all_well(report: Figures) -> bool:
    """Whether every item came to its end, and every row that says so is as it has to be."""
    items = report["items"].values()
    return all(item["ended_early"] is None and all(row.get("ok", True) for row in item["rows"]) for item in items)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = ",".join(name for name, item in ITEMS.items() if not item.is_extra)
    parser.add_argument("--output", type=Path, default=Path("benchmarks"), metavar="FOLDER", help="where figures go")
    parser.add_argument("--items", default=usual, metavar="NAMES", help="which, with commas between them")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the processor, in this process")
    parser.add_argument("--apart", action="store_true", help="give the items of a rehearsal their processes, too")
    parser.add_argument("--item", nargs=2, metavar=("NAME", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    names = [name for name in options.items.split(",") if name]
    unknown = [name for name in names if name not in ITEMS]
    if unknown:
        print(f"--items: there is no {unknown[0]!r}. There are {', '.join(ITEMS)}.", file=sys.stderr)
        return 2
    if not torch.cuda.is_available() and not options.rehearse:
        print(
            "torch finds no CUDA card here, and this measures one. --rehearse goes through the same code on the"
            " processor, with tiny shapes.",
            file=sys.stderr,
        )
        return 2
    if options.item:
        run_item(options.item[0], options.rehearse, Path(options.item[1]))
        return 0
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        report = bench(names, options.rehearse, options.apart or not options.rehearse, options.output)
    except OSError as fault:
        print(f"--output {options.output}: cannot be written ({fault.strerror}).", file=sys.stderr)
        return 2
    print(markdown(report))
    return 0 if is_all_well(report) else 1


if __name__ == "__main__":
    sys.exit(main())
