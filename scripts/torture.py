#!/usr/bin/env python3
"""Break runs in every way there is, many times, and see that none is lost, mixed or changed.

    scripts/torture.py                                   every lane, at its default size
    scripts/torture.py --only R1 R4 --cases R1=200 --seed 0 --output benchmarks/torture.md

Prints a table and writes it as Markdown if asked; exits 1 on any failure, each told in full with how to see it again.
"""

import argparse
import importlib.metadata
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parent.parent
LANES: dict[str, tuple[str, int]] = {  # id: module, cases
    "R1": ("random_kills", 200),
    "R2": ("every_write", 3),
    "R4": ("bit_flips", 1000),
    "R5": ("changed_fields", 1),
    "R7": ("matrix", 48),
    "R9": ("signals", 100),
    "R10": ("rank_kills", 250),
    "O1": ("out_of_memory", 1),
    "L1": ("cross_entropy", 100),
    "L2": ("factorings", 6),
    "L3": ("neighbours", 1000),
    "L5": ("not_finite", 20),
    "B1": ("recipes", 10_000),
    "B2": ("rows", 10_000),
    "B4": ("full_disk", 200),
    "S1": ("pickles", 500),
    "S2": ("leaked_secrets", 1),
    "S3": ("paths", 500),
    "S4": ("templates", 20),
    "S5": ("sockets", 3),
}
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets")


@dataclass(frozen=True)
class Result:
    """What became of one lane; `failures` are the number of a case, counted from 1, and what was wrong with it.

    `asked` is what --cases said, which is rounds of many cases in some lanes.
    """

    lane: str
    what: str
    asked: int
    cases: int
    failures: tuple[tuple[int, str], ...]
    seconds: float
    seed: int

    def told(self) -> list[str]:
        again = f"scripts/torture.py --only {self.lane} --seed {self.seed} --cases {self.lane}="
        return [
            f"{self.lane} case {number}: {text}\n  again: {again}{min(number, self.asked)}"
            for number, text in self.failures
        ]


def try_lane(lane: str, cases: int, seed: int, progress: Progress) -> Result:
    module = importlib.import_module(f"fault_lab.{LANES[lane][0]}")
    task = progress.add_task(f"{lane} {module.WHAT}", total=None)
    began, done, failures = time.monotonic(), 0, []
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        verdicts: Iterator[str | None] = module.run(cases, seed, Path(folder))
        for done, fault in enumerate(verdicts, start=1):
            progress.update(task, completed=done)
            if fault is not None:
                failures.append((done, fault))
                progress.console.print(f"[red]{lane} case {done}[/]: {fault}", markup=True, highlight=False)
    return Result(lane, module.WHAT, cases, done, tuple(failures), time.monotonic() - began, seed)


def table(results: Sequence[Result]) -> Table:
    made = Table("id", "fault", "cases", "failures", "seconds", box=None, padding=(0, 2, 0, 0))
    for result in results:
        made.add_row(*_cells(result))
    return made


def _cells(result: Result) -> tuple[str, ...]:
    return (result.lane, result.what, f"{result.cases:,}", f"{len(result.failures):,}", f"{result.seconds:,.0f}")


def markdown(results: Sequence[Result], before: str = "") -> str:
    """The page; lanes that `before` has and that were not run this time keep their line."""
    rows = {
        line.split()[1]: line for line in before.splitlines() if line.startswith(tuple(f"| {id} |" for id in LANES))
    }
    rows |= {result.lane: f"| {' | '.join(_cells(result))} |" for result in results}
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    lines = ["# What was broken on purpose", ""]
    lines += [f"`scripts/torture.py`, {date.today()}, seed {results[0].seed}, {os.cpu_count()} cores, no GPU.", ""]
    lines += [f"Python {platform.python_version()}, {versions}.", ""]
    lines += ["| id | fault | cases | failures | seconds |", "|---|---|---:|---:|---:|"]
    lines += [rows[lane] for lane in LANES if lane in rows]
    failures = [text for result in results for text in result.told()]
    if failures:
        lines += ["", "## Failures", "", "```", *failures, "```"]
    return "\n".join(lines) + "\n"


def prepare_imports() -> None:
    """What the lanes have to find before they import torch.

    One thread, as forks take no thread pool with them; no network, no kept rows; and the tests, for their models,
    mutators and spellings.
    """
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "QTUNE_CACHE": "off",
        "TORCH_CPP_LOG_LEVEL": "FATAL",
    }
    sys.path[:0] = [
        str(REPOSITORY / folder) for folder in ("", "scripts", "tests", "tests/support", "tests/recipe", "tests/memory")
    ]


def asked_cases(texts: Sequence[str], lanes: Sequence[str]) -> Mapping[str, int]:
    """The number of cases by lane: the defaults, changed by texts such as `R1=200`."""
    cases = {lane: LANES[lane][1] for lane in lanes}
    for text in texts:
        lane, _, count = text.partition("=")
        if lane not in cases or not count.isdigit():
            sys.exit(f"--cases {text}: must be LANE=NUMBER, the lane one of {', '.join(cases)}.")
        cases[lane] = int(count)
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=LANES, default=list(LANES), metavar="LANE", help="these lanes")
    parser.add_argument("--cases", nargs="+", default=[], metavar="LANE=NUMBER", help="how often, by lane")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the table as Markdown")
    options = parser.parse_args()
    cases = asked_cases(options.cases, options.only)
    prepare_imports()
    console = Console()
    with Progress(*Progress.get_default_columns()[:1], console=console, transient=True) as progress:
        results = [try_lane(lane, count, options.seed, progress) for lane, count in cases.items()]
    console.print(table(results))
    failures = [text for result in results for text in result.told()]
    console.print("\n".join(failures), markup=False, highlight=False)
    if options.output:
        before = options.output.read_text(encoding="utf-8") if options.output.is_file() else ""
        options.output.write_text(markdown(results, before), encoding="utf-8")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
