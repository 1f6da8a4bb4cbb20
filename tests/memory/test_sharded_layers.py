"""Layers of which every rank holds a part, in real processes over gloo: the same bits as with whole ones."""

from dataclasses import replace

import pytest
import torch
from arithmetic import STANDING
from made_models import LAYERS, adapted, assert_equal, base, batch, held_out, on_cpu, one_pass
from made_ranks import all_well, launch
from peft import PeftModel

from qtune.distributed.ranks import Ranks
from qtune.memory.engine import Engine
from qtune.memory.gradient_checkpointing import find_layers
from qtune.memory.memory_parts import standing_parts
from qtune.memory.memory_tracker import storage_sizes
from qtune.memory.techniques import Techniques
from qtune.memory.techniques.standing import Layer
from qtune.memory.weight_streaming import frozen_tensors, layout

WAYS = {
    "on the device": Techniques(recomputed_layers=LAYERS, sharded_layers=LAYERS),
    "on the host": Techniques(recomputed_layers=LAYERS, sharded_layers=LAYERS, streamed_layers=LAYERS),
    "some of each": Techniques(recomputed_layers=LAYERS, sharded_layers=2, streamed_layers=1),
    "one": Techniques(recomputed_layers=LAYERS, sharded_layers=1),
}


def in_parts(ranks: Ranks, kind: str, ways: list[str]) -> None:
    """Losses, gradients and answers of a model in parts are those of the whole one, to the bit."""
    plain = adapted(base(kind, nf4="double"))
    Engine(plain)
    prompt = {"input_ids": batch()["input_ids"][:, :9], "max_new_tokens": 3, "do_sample": False, "use_cache": True}
    lengths = ((23, 9, 1, 30), (12,))
    passes = [one_pass(plain, batch(each)) for each in lengths]
    losses = [held_out(plain, batch(each)) for each in lengths]
    answer = plain.eval().generate(**prompt)
    for way in ways:
        ours = adapted(base(kind, nf4="double"))
        engine = Engine(ours, ranks)
        engine.switch_to(WAYS[way])
        with on_cpu(ours).passes_together():
            for each, expected, loss in zip(lengths, passes, losses, strict=True):
                assert_equal(one_pass(ours, batch(each)), expected)
                assert held_out(ours, batch(each)) == loss
            assert torch.equal(ours.eval().generate(**prompt), answer)
        assert_as_forecast(ours, engine, plain)


def assert_as_forecast(ours: PeftModel, engine: Engine, plain: PeftModel) -> None:
    """What stands by part is what a plan says of it, to the byte."""
    before = {part: storage_sizes(tensors) for part, _, tensors in standing_parts(plain, None, None)}
    layers = tuple(
        Layer(storage_sizes(tensor for tensor, _ in frozen_tensors(layer)), layout(layer)[1])
        for layer in find_layers(plain)
    )
    standing = replace(STANDING, base_bytes=before["base"], layers=layers, ranks=engine.ranks.size)
    live = {(part, side): storage_sizes(tensors) for part, side, tensors in standing_parts(ours, engine, None)}
    on_device = engine.techniques.on_device(standing)
    for part in ("base", "streamed layers", "sharded layers"):
        assert live.get((part, "device"), 0) == on_device[part], part
    assert live.get(("streamed layers", "host"), 0) == engine.techniques.on_host(standing)["streamed layers"]


def test_two_ranks(tmp_path) -> None:
    all_well(launch(2, in_parts, "llama", list(WAYS)))


@pytest.mark.long
@pytest.mark.parametrize("kind", ["gated delta net", "gemma3"])  # of experts: test_dealt_layers
@pytest.mark.parametrize("size", [2, 3, 4])
def test_more_ranks_and_other_kinds(kind, size) -> None:
    all_well(launch(size, in_parts, kind, list(WAYS)))


def test_in_one_process_they_are_streamed() -> None:
    """A run that goes on alone, or answers, has the plan of several."""
    plain, ours = adapted(base("llama", nf4="double")), adapted(base("llama", nf4="double"))
    Engine(plain)
    engine = Engine(ours)
    engine.switch_to(WAYS["some of each"])
    assert_equal(one_pass(ours, batch()), one_pass(plain, batch()))
    assert_as_forecast(ours, engine, adapted(base("llama", nf4="double")))
