"""Every memory technique, and every two of them, on a card: what is put where, and what a pass gives."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from card import CARD
from made_models import Pass, assert_equal, batch, held_out, one_pass, trained

from qtune.evaluate.held_out_loss import to_device
from qtune.memory.engine import Engine
from qtune.memory.techniques import Techniques
from qtune.model import adapter, base
from qtune.recipe.schema import Lora, Model

DOCUMENTS = (9, 5)
ALONE: dict[str, dict[str, Any]] = {
    "recomputed": {"recomputed_layers": 1},
    "host checkpoints": {"recomputed_layers": 2, "host_checkpoints": True},
    "tiles": {"tile_tokens": 8},
    "head groups": {"head_groups": 2},
    "host embedding": {"host_embedding": True},
    "host head": {"head": "host"},
    "head in NF4": {"head": "nf4"},
    "one streamed": {"recomputed_layers": 2, "streamed_layers": 1},
    "all streamed": {"recomputed_layers": 2, "streamed_layers": 2},
}
CONTAINED = ({"recomputed", "host checkpoints"}, {"recomputed", "all streamed"}, {"host head", "head in NF4"})
PAIRS = [
    pair
    for pair in itertools.combinations(ALONE, 2)
    if set(pair) not in CONTAINED and "one streamed" not in pair  # as all streamed, and one that is not
]


def techniques(*names: str) -> Techniques:
    return Techniques(**{name: value for each in names for name, value in ALONE[each].items()})


def one_pass_on(folder: Path, device: str, on: Techniques) -> tuple[Pass, float]:
    """From the files to the gradients, and to the held-out loss."""
    model = adapter.attach(base.load_base(Model(base=str(folder)), device, "float32", on), Lora(rank=4), 0)
    generator = torch.Generator().manual_seed(1)
    for parameter in trained(model):
        parameter.data = torch.randn(parameter.shape, generator=generator).mul_(0.1).to(device)
    Engine(model).switch_to(on)
    given = {name: to_device(value, device) for name, value in batch(DOCUMENTS).items()}
    return one_pass(model, given), held_out(model, given)


@pytest.mark.parametrize("names", [*((name,) for name in ALONE), *PAIRS], ids=" and ".join)
def test_a_pass_on_a_card_is_that_on_the_processor(tiny_base: Path, names: tuple[str, ...]) -> None:
    ours, ours_held_out = one_pass_on(tiny_base, CARD, techniques(*names))
    theirs, theirs_held_out = one_pass_on(tiny_base, "cpu", techniques(*names))
    assert_equal(Pass(ours.nats, {name: gradient.cpu() for name, gradient in ours.gradients.items()}), theirs)
    assert ours_held_out == theirs_held_out
