#!/usr/bin/env python3
"""What `qtune plan` says of many models and cards, and how long it takes to say it: markdown tables of forecasts.

    scripts/bench_plan.py CONFIGS [--tokens 2048] [--rank 16] [--host-memory 64GiB]
    scripts/bench_plan.py CONFIGS --longest NAME [--rank 32] [--host-memory 128GiB]

CONFIGS is a folder of config.json files, at any depth; no weights are needed. The second form gives the longest context
of the one model whose path contains NAME, beside the figures Unsloth publishes for Llama-3.1-8B. Nothing is measured:
every figure is a forecast for a card that is not here.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qtune.errors import QtuneError
from qtune.hardware import ASSUMED_CONTEXT_BYTES, OLDEST_WITH
from qtune.memory.techniques import Techniques
from qtune.model import base
from qtune.plan.activation_memory import forecaster
from qtune.plan.ladder import Budget, Climb, Ladder
from qtune.plan.workload import Work
from qtune.recipe.load import load
from qtune.recipe.schema import HOST_FRACTION
from qtune.units import GIB, format_bytes, parse_bytes

CARDS_GIB = (6, 8, 12, 16, 24, 80)
UNSLOTH_TOKENS = {8: 2_972, 12: 21_848, 16: 40_724, 24: 78_475, 40: 153_977, 80: 342_733}  # unsloth.ai, r = 32
RECIPE = """\
name = "bench"
[model]
base = "{base}"
[lora]
rank = {rank}
[data]
train = "nobody/reads-this"
max_tokens = {tokens}
"""
SHORT = {
    "recomputed_layers": "recompute",
    "host_checkpoints": "offload",
    "tile_tokens": "tiles",
    "host_embedding": "embedding",
    "head": "head",
    "streamed_layers": "stream",
    "head_groups": "head groups",
    "recomputed_attention": "attention again",
    "sharded_layers": "parts",
}


def configs(folder: Path, target: Path) -> Iterator[tuple[str, Path]]:
    """Each model's name, and a folder in `target` with its config.json and no weights."""
    for path in sorted(folder.rglob("*.json")):
        described = json.loads(path.read_text(encoding="utf-8"))
        if "model_type" not in described:
            continue
        name = path.parent.name if path.name == "config.json" else path.name.removesuffix(".json")
        home = target / name.removesuffix(".config")
        home.mkdir(exist_ok=True)
        shutil.copy(path, home / "config.json")
        (home / "model.safetensors").touch()  # a base without weights is refused before it is planned
        yield home.name, home


def plan(recipe: Path, *arguments: str) -> tuple[int, str, float]:
    """Exit code, standard output or error, and seconds of `qtune plan`."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "qtune", "plan", str(recipe), "--json", *arguments]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    return child.returncode, child.stdout or child.stderr, time.perf_counter() - start


def cell(climb: Climb, layers: int) -> str:
    """`5.8 GiB: recompute 31, offload`, or that there is no plan."""
    needed = format_bytes(climb.forecast.needed_bytes)
    return f"{needed}: {rungs(asdict(climb.techniques), layers)}" if climb.fits else f"no ({needed})"


def rungs(techniques: dict[str, Any], layers: int) -> str:
    """The techniques that are on, those with an amount less than all of it with their amount."""
    told = []
    for field, off in asdict(Techniques()).items():
        value, name = techniques[field], SHORT[field]
        if value != off:
            partly = field in ("recomputed_layers", "recomputed_attention", "streamed_layers") and value < layers
            told.append(f"{name} {value}" if partly or field == "head" else name)
    return ", ".join(told) or "nothing needed"


def every_model(options: argparse.Namespace, folder: Path) -> None:
    """Each model's climb for every card, its traces shared between them, as they do not depend on the card's size."""
    base.quiet_libraries()
    host_bytes = round(HOST_FRACTION * (parse_bytes(options.host_memory) or 0))
    sizes = " | ".join(f"{gib} GiB" for gib in CARDS_GIB)
    print(f"| model | {sizes} | all six took |\n|{'---|' * (len(CARDS_GIB) + 2)}")
    for name, home in configs(options.configs, folder):
        path = folder / f"{name}.toml"
        path.write_text(RECIPE.format(base=home, rank=options.rank, tokens=options.tokens))
        start, work = time.perf_counter(), Work.of_full_sequences(options.tokens)
        try:
            recipe = load(path)
            config = base.read_config_alone(recipe.model)
            forecasts = forecaster(config, recipe, "bfloat16", OLDEST_WITH["bfloat16"], ASSUMED_CONTEXT_BYTES)
            climbs = [Ladder(forecasts, work, Budget(gib * GIB, host_bytes)).climb() for gib in CARDS_GIB]
            cells = [cell(climb, forecasts.layers) for climb in climbs]
        except QtuneError as fault:
            print(f"{name}: {fault}", file=sys.stderr)
            cells = ["refused"] * len(CARDS_GIB)
        print(f"| {name} | {' | '.join(cells)} | {time.perf_counter() - start:.1f} s |", flush=True)


def one_model(options: argparse.Namespace, folder: Path) -> None:
    name, home = next(found for found in configs(options.configs, folder) if options.longest in found[0])
    recipe = folder / "longest.toml"
    recipe.write_text(RECIPE.format(base=home, rank=options.rank, tokens=options.tokens))
    print(f"{name}, rank {options.rank}, one sequence a batch, {options.host_memory} of host memory\n")
    print("| card | qtune, forecast | Unsloth, published |\n|---|---|---|")
    for gib, published in UNSLOTH_TOKENS.items():
        _, output, _ = plan(recipe, "--longest", f"--device-memory={gib}GiB", f"--host-memory={options.host_memory}")
        tokens = json.loads(output)[0]["tokens"]
        print(f"| {gib} GiB | {tokens:,} | {published:,} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", type=Path, help="folder with config.json files")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens in a sequence")
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapter on all linears")
    parser.add_argument("--host-memory", default="64GiB", help="host memory of the imagined machine")
    parser.add_argument("--longest", metavar="NAME", help="the longest contexts of one model")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (one_model if options.longest else every_model)(options, Path(folder))


if __name__ == "__main__":
    main()
