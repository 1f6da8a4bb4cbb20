#!/usr/bin/env python3
"""Are two runs the same run? Compares their metrics.jsonl event by event, times left out.

    scripts/compare_losses.py runs/before runs/after [--within 1e-6]

Prints the first event that differs and exits 1; a refactor should print "the same".
"""

import argparse
import json
import sys
from itertools import zip_longest
from pathlib import Path

TIME = "_seconds"


def events(run: Path) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.endswith(TIME)} for line in lines]


def is_close(one: object, other: object, within: float) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return one == other or abs(one - other) <= within
    return one == other


def differ(one: dict | None, other: dict | None, within: float) -> bool:
    if one is None or other is None or one.keys() != other.keys():
        return True
    return not all(is_close(one[key], other[key], within) for key in one)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("one", type=Path)
    parser.add_argument("other", type=Path)
    parser.add_argument("--within", type=float, default=0.0, help="how far two numbers may lie apart")
    options = parser.parse_args()
    pairs = list(zip_longest(events(options.one), events(options.other)))
    for number, (one, other) in enumerate(pairs, start=1):
        if differ(one, other, options.within):
            sys.exit(f"event {number} differs:\n{one}\n{other}")
    print(f"the same: {len(pairs)} events")


if __name__ == "__main__":
    main()
