"""What loading and saving take of a card's memory."""

from pathlib import Path

import pytest
import torch
from card import CARD, memory

from qtune import cache_dir
from qtune.errors import MachineError
from qtune.memory.techniques import Techniques
from qtune.model import adapter, base, nf4_cache
from qtune.recipe.schema import Lora, Model

LEAN = Techniques(host_embedding=True, recomputed_layers=2, streamed_layers=2)


def test_no_memory_is_reserved_for_what_lives_on_the_host(tiny_base: Path) -> None:
    """transformers asks for all that it will load in one piece, before it loads."""
    memory.largest = 0
    base.load_base(Model(base=str(tiny_base)), CARD, "bfloat16", LEAN)
    assert memory.largest == 4 * 64 * 172  # one weight of an MLP as it is in the file


def test_a_base_from_the_cache_goes_where_the_plan_has_it(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An entry does not depend on where a plan puts things: what was made on the card alone is left on the host."""
    monkeypatch.setenv(cache_dir.VARIABLE, str(tmp_path))
    monkeypatch.setattr(nf4_cache, "LEAST_BYTES", 0)
    spec = Model(base=str(tiny_base))
    places = []
    for techniques in (Techniques(), LEAN):
        once, again = (base.load_base(spec, CARD, "bfloat16", techniques) for _ in range(2))
        places.append({name: weight.device.type for name, weight in once.named_parameters()})
        assert {name: weight.device.type for name, weight in again.named_parameters()} == places[-1]
        for (name, ours), theirs in zip(once.named_parameters(), again.parameters(), strict=True):
            assert torch.equal(ours.cpu(), theirs.cpu()), name
    assert set(places[0].values()) == {"card"}
    assert set(places[1].values()) == {"card", "cpu"}
    assert len(cache_dir.entries()) == 1


@pytest.mark.parametrize(("quantization", "held_in"), [("nf4", "4 bits"), ("none", "bfloat16")])
def test_a_base_that_is_too_large_is_a_refusal(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch, quantization: str, held_in: str
) -> None:
    monkeypatch.setattr(memory, "total", memory.allocated + 32 * 1024)
    with pytest.raises(
        MachineError, match=rf"in {held_in} it does not fit .* memory of {CARD}\..* CUDA_VISIBLE_DEVICES="
    ):
        base.load_base(Model(base=str(tiny_base), quantization=quantization), CARD, "bfloat16")


def test_an_adapter_is_saved_when_nothing_is_free(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """peft went through all of the base for it, and bitsandbytes copied a table for each weight of that."""
    model = adapter.attach(base.load_base(Model(base=str(tiny_base)), CARD, "bfloat16"), Lora(rank=4), 0)
    monkeypatch.setattr(memory, "total", memory.allocated)
    assert adapter.save(model, tmp_path / "adapter", "base")
