#!/usr/bin/env python3
"""Seconds of a training step on several cards, on paper: the table in docs/cards.md.

    scripts/cards_table.py            # print it
    scripts/cards_table.py --write    # put it into docs/cards.md

Arithmetic is counted as `qtune plan` counts it, with every layer recomputed, at half of the makers' figures; links are
those of `qtune/plan/world.py`. Nothing of it was measured on cards.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from qtune.gpu_models import memory_of
from qtune.hardware import published_operations
from qtune.memory.techniques.standing import ATTENTION_PASSES
from qtune.plan.throughput import GRADIENT_BYTES
from qtune.plan.world import LINKS, World
from qtune.units import GIB

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cards.md"
BEGINS, ENDS = "<!-- written by scripts/cards_table.py -->\n", "<!-- end -->\n"
PACKS, TOKENS = 16, 2048  # of a step; of a pack, one document
NF4_BYTES = 4.127 / 8  # of a weight, with its scales quantised again: QLoRA, Dettmers et al. 2023


@dataclass(frozen=True)
class Model:
    """Weights of all layers, of the head; heads x head_dim; weights of an adapter of rank 16 on all linears."""

    name: str
    layers: int
    in_layers: float
    in_head: float
    width: int
    trained: int

    @property
    def layer_bytes(self) -> int:
        return round(self.in_layers * NF4_BYTES)

    def pass_seconds(self, rate: float) -> tuple[float, float]:
        """Forward and backward of one pack, at `rate` operations a second."""
        attention = 2 * self.width * self.layers * TOKENS * TOKENS
        forward = 2 * (self.in_layers + self.in_head + self.trained) * TOKENS + attention
        again = 2 * self.in_layers * TOKENS + attention
        backward = (2 * (self.in_layers + self.in_head) + 4 * self.trained) * TOKENS
        return forward / rate, (backward + (ATTENTION_PASSES - 1) * attention + again) / rate


MODELS = (  # config.json of meta-llama/Llama-3.1-8B and -70B; adapters as peft counts them
    Model("8B", 32, 6.98e9, 0.525e9, 4096, 41_943_040),
    Model("70B", 80, 68.45e9, 1.05e9, 8192, 207_093_760),
)
SETUPS = (  # how many of which card, and what joins them
    (2, "RTX 3090", "pcie4"),
    (2, "RTX 3090", "nvlink3"),
    (4, "RTX 4090", "pcie4"),
    (2, "RTX 4090", "10gbe"),
    (2, "RTX 4090", "1gbe"),
    (8, "H100 80GB", "nvlink4"),
)


def seconds(model: Model, count: int, card: str, link: str) -> tuple[float | None, float, float]:
    """Of a step on one such card, on all as replicas, and with every layer in parts; None where the base alone is more
    than the card has."""
    rate = published_operations(card)
    assert rate is not None
    forward, backward = model.pass_seconds(rate)
    world = World(count, count, LINKS[link])
    summing, share = world.sum_seconds(GRADIENT_BYTES * model.trained), world.share(PACKS)
    alone = PACKS * (forward + backward)
    in_parts = share * world.pass_seconds(forward, backward, model.layers, model.layer_bytes) + summing
    return alone, share * (forward + backward) + summing, in_parts


def cells(model: Model, count: int, card: str, link: str) -> list[str]:
    alone, replicas, in_parts = seconds(model, count, card, link)
    whole_fits = model.layer_bytes < memory_of(card)
    parts_fit = model.layer_bytes / count < memory_of(card)
    whole = [_told(alone), _told(replicas)] if whole_fits else ["does not fit", "does not fit"]
    return [*whole, _told(in_parts) if parts_fit else "does not fit"]


def _told(value: float) -> str:
    return f"{value:.1f} s" if value < 100 else f"{value:,.0f} s"


def table() -> str:
    head = [f"{model.name}, {way}" for model in MODELS for way in ("one card", "replicas", "in parts")]
    lines = [
        f"A step of {PACKS} packs of {TOKENS:,} tokens, with an adapter of rank 16 on all linears and every layer",
        "recomputed: on one card, on all with the whole base on each (replicas), and on all with every layer in parts.",
        "Cards reach half of the makers' arithmetic, links what `qtune/plan/world.py` says. The model is held against",
        "processes that talk over gloo (`tests/plan/test_world.py`); no figure was measured on cards.",
        "",
        f"| cards | link | {' | '.join(head)} |",
        f"| --- | --- |{' --- |' * len(head)}",
    ]
    for count, card, link in SETUPS:
        each = [cell for model in MODELS for cell in cells(model, count, card, link)]
        lines.append(f"| {count} x {card} | {link} | {' | '.join(each)} |")
    bases = " and ".join(f"{model.layer_bytes / GIB:.0f} GiB ({model.name})" for model in MODELS)
    lines += [
        "",
        f"The layers in NF4 are {bases}. What does not fit can be streamed from host memory: `qtune plan` says.",
    ]
    return "\n".join(lines) + "\n"


def written() -> str:
    """The page with the table as it is now."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGINS)
    return before + BEGINS + table() + ENDS + rest.partition(ENDS)[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/cards.md")
    if parser.parse_args().write:
        PAGE.write_text(written(), encoding="utf-8")
    else:
        print(table(), end="")


if __name__ == "__main__":
    main()
