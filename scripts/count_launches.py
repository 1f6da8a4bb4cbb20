#!/usr/bin/env python3
"""What one decoder layer costs a card beside arithmetic: kernels launched and bytes moved, forward and backward.

    scripts/count_launches.py
    scripts/count_launches.py --json after.json --beside benchmarks/launches_before.json --output benchmarks/launches.md

Runs a pass of fake tensors, as a forecast does for a card, through models of two and three layers; the difference is
one layer. Every operation that is no view counts as one kernel, and moves each tensor that it is given or makes once,
read or written: what a cache holds is not known here. Attention itself has no kernels here: add one forward and up to
five backward, twice that where it is recomputed, for each call of it. No card is needed, and nothing is timed.

The layer is that of Llama-3.1-8B with LoRA of rank 16 on all linears, and 2,048 tokens: one document, or four.
"""

import argparse
import datetime
import importlib.metadata
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, PreTrainedConfig

from qtune.memory.memory_tracker import NO_KERNEL, LiveBytes, moved_bytes
from qtune.memory.techniques import Techniques
from qtune.plan.activation_memory import trace
from qtune.plan.workload import BatchShape
from qtune.recipe.schema import Data, Lora, Model, Recipe, Train

TOKENS, TILE_TOKENS = 2048, 1024
CAPABILITY = (8, 9)  # of an RTX 4090
DOCUMENTS = {"1": (TOKENS,), "4": (1024, 512, 384, 128)}
TECHNIQUES = {"none": (False, 0), "recompute": (True, 0), "recompute, tiles": (True, TILE_TOKENS)}
RECIPE = Recipe(name="launches", model=Model(base="demo"), lora=Lora(rank=16), data=Data(train="none"), train=Train())
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


def llama_8b(layers: int) -> PreTrainedConfig:
    """Llama-3.1-8B but for its depth and its vocabulary, which no layer sees."""
    return LlamaConfig(
        vocab_size=1024,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=TOKENS,
    )


@dataclass
class Way:
    """One way through the model: kernels, bytes moved, and kernels by name."""

    launches: int = 0
    bytes: int = 0
    names: dict[str, int] = field(default_factory=dict)

    def without(self, other: "Way") -> "Way":
        more = {name: count - other.names.get(name, 0) for name, count in self.names.items()}
        names = {name: count for name, count in more.items() if count}
        return Way(self.launches - other.launches, self.bytes - other.bytes, names)


class Launches(LiveBytes):
    """Counts kernels as well as live bytes, in the forward pass and in the backward one apart."""

    def __init__(self) -> None:
        super().__init__(card=CAPABILITY)
        self.forward, self.backward = Way(), Way()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        name = func._overloadpacket.__name__
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, FakeTensor)]
        if (made or name.startswith("_foreach")) and name not in NO_KERNEL and self.phase != "load":
            way = self.forward if torch._C._current_graph_task_id() < 0 else self.backward
            way.launches += 1
            way.names[name] = way.names.get(name, 0) + 1
            way.bytes += moved_bytes(name, args, result)
        return result


def of_a_pass(layers: int, is_recomputed: bool, tile_tokens: int, documents: tuple[int, ...]) -> tuple[Launches, int]:
    """What a pass through `layers` layers launches, and bytes that the second layer keeps for its backward pass."""
    counter = Launches()
    again = layers if is_recomputed else 0
    techniques = Techniques(recomputed_layers=again, tile_tokens=tile_tokens, recomputed_attention=again)
    batch = BatchShape(documents, sum(documents))
    traced = trace(llama_8b(layers), RECIPE, "bfloat16", techniques, batch, CAPABILITY, counter)
    return counter, sum(traced.left_by(1).device.values()) if layers > 2 else 0


@dataclass(frozen=True)
class OfALayer:
    """One row of the table."""

    techniques: str
    documents: str
    forward: Way
    backward: Way
    kept_bytes: int

    @property
    def launches(self) -> int:
        return self.forward.launches + self.backward.launches

    @property
    def bytes(self) -> int:
        return self.forward.bytes + self.backward.bytes


def of_a_layer(techniques: str, documents: str) -> OfALayer:
    asked = (*TECHNIQUES[techniques], DOCUMENTS[documents])
    (few, _), (more, kept) = of_a_pass(2, *asked), of_a_pass(3, *asked)
    forward, backward = more.forward.without(few.forward), more.backward.without(few.backward)
    return OfALayer(techniques, documents, forward, backward, kept)


def as_json(rows: list[OfALayer]) -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {"date": f"{datetime.date.today()}", "versions": versions, "rows": [asdict(row) for row in rows]}


def _cells(row: dict[str, Any]) -> list[str]:
    ways = (row["forward"], row["backward"])
    launches, moved = ([way[name] for way in ways] for name in ("launches", "bytes"))
    return [
        *(f"{number}" for number in (*launches, sum(launches))),
        *(f"{size / 2**20:,.0f}" for size in (*moved, sum(moved), row["kept_bytes"])),
    ]


def table(figures: dict[str, Any]) -> str:
    """The rows as Markdown."""
    heads = ["techniques", "documents", "launches forward", "backward", "both", "MiB moved forward", "backward", "both"]
    lines = [[*heads, "MiB kept"], ["---", *["---:"] * 8]]
    lines += [[row["techniques"], row["documents"], *_cells(row)] for row in figures["rows"]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def page(figures: dict[str, Any], earlier: dict[str, Any] | None) -> str:
    """benchmarks/launches.md."""
    about = (__doc__ or "").split("\n\n")
    sections = ["# Launches and bytes of a decoder layer", *about[2:]]
    named = (("Before its operations were fused", earlier), ("Now", figures))
    for name, each in named:
        if each is not None:
            versions = ", ".join(f"{library} {version}" for library, version in each["versions"].items())
            sections += [f"## {name}", f"{each['date']}, {versions}.", table(each)]
    return "\n\n".join(section.strip() for section in sections) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--beside", type=Path, metavar="FILE", help="figures of an earlier state, shown above these")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the page here instead of printing it")
    parser.add_argument("--names", action="store_true", help="list each kernel by name, too")
    options = parser.parse_args()
    rows = [of_a_layer(techniques, documents) for techniques in TECHNIQUES for documents in DOCUMENTS]
    figures = as_json(rows)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    text = page(figures, json.loads(options.beside.read_text(encoding="utf-8")) if options.beside else None)
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    else:
        print(text)
    for row in rows if options.names else ():
        print(row.techniques, row.documents, "forward", dict(row.forward.names), "backward", dict(row.backward.names))


if __name__ == "__main__":
    main()
