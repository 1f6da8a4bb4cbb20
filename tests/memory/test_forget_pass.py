"""A pass that fails half-way, wherever that is: what it leaves is dropped, and the next pass is exact."""

from dataclasses import replace

import pytest
import torch
from made_models import LAYERS, Pass, adapted, assert_equal, base, batch, one_pass, switched

from qtune.memory.gradient_checkpointing import find_layers
from qtune.memory.techniques import Techniques

ALL = Techniques(
    recomputed_layers=LAYERS,
    host_checkpoints=True,
    tile_tokens=32,  # of 63
    host_embedding=True,
    streamed_layers=LAYERS,
    head_groups=2,
)


class Faulty:
    """A hook that fails the `fail_at`-th time it is called, once."""

    def __init__(self) -> None:
        self.calls, self.fail_at = 0, -1

    def __call__(self, module: torch.nn.Module, arguments: object) -> None:
        self.calls += 1
        if self.calls == self.fail_at:
            raise RuntimeError("injected")


@pytest.mark.parametrize("lora", [{}, {"lora_dropout": 0.2}], ids=["plain", "dropout"])
def test_after_a_fault_anywhere_in_a_pass_the_next_one_is_exact(lora) -> None:
    model = adapted(base("llama", nf4="double"), **lora)
    techniques = replace(ALL, head_groups=1) if lora else ALL
    engine = switched(model, techniques)
    faulty = Faulty()
    for layer in find_layers(model):
        layer.mlp.up_proj.register_forward_pre_hook(faulty)

    def seeded() -> Pass:
        torch.manual_seed(3)
        return one_pass(model, batch())

    one_pass(model, batch())  # the first pass finds out what can be skipped
    faulty.calls = 0
    expected = seeded()
    calls = faulty.calls
    for place in range(1, calls + 1):
        faulty.calls, faulty.fail_at = 0, place
        with pytest.raises(RuntimeError, match="injected"):
            seeded()
        assert faulty.calls == place
        engine.forget_pass()
        model.zero_grad()
        assert_equal(seeded(), expected)
