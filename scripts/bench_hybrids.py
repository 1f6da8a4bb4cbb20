#!/usr/bin/env python3
"""What a useful token costs in a pack beside the same documents in a pass each, for layers that are not attention.

    scripts/bench_hybrids.py [--rounds 5] [kinds ...]

A tiny base of each kind in NF4 with an adapter, forward and backward: processor's seconds of both ways in turn, the
median of the rounds. Exits 1 where packing costs more than `MOST` times as much. Wants a machine that is idle.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import conformance

KINDS = ("qwen3_5_text", "bamba", "mamba2", "lfm2", "minimax", "recurrent_gemma", "kimi_linear")
PACKS = {"ten short": [23, 61, 40, 9, 75, 31, 52, 18, 66, 44], "four long": [300, 512, 410, 260]}
MOST = 1.3


def ratio(kind: str, lengths: list[int], rounds: int) -> float:
    """Seconds of a pack of documents of such lengths, over those of a pass for each."""
    import torch
    from conforming import proofs, small_models

    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(6, 262, (length,), generator=draw).tolist() for length in lengths]
    documents = [(row, row) for row in rows]
    seconds: dict[bool, list[float]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as folder:
        small_models.save(kind, Path(folder) / "base")
        model = proofs.tuned_at_once(kind, Path(folder)).model
        for _ in range(rounds + 1):
            for is_packed, spent in seconds.items():
                began = time.process_time()
                proofs.one_pass(model, documents, is_packed)
                spent.append(time.process_time() - began)
    packed, alone = (statistics.median(spent[1:]) for spent in seconds.values())  # the first of each warms up
    return packed / alone


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=KINDS, help="model types")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    conformance.prepare_imports()
    print(f"| model type | {' | '.join(PACKS)} |\n|{'---|' * (len(PACKS) + 1)}")
    highest = 0.0
    for kind in options.kinds:
        ratios = [ratio(kind, lengths, options.rounds) for lengths in PACKS.values()]
        print(f"| {kind} | {' | '.join(f'{each:.2f}' for each in ratios)} |", flush=True)
        highest = max(highest, *ratios)
    return int(highest > MOST)


if __name__ == "__main__":
    sys.exit(main())
