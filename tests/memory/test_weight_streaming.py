"""Frozen layers that visit the device: the same bits, two layers of them at most, and none read from anywhere else."""

from itertools import pairwise

import pytest
import torch
from arithmetic import STANDING
from crossed import crossed
from made_models import (
    LAYERS,
    adapted,
    assert_close,
    assert_equal,
    base,
    batch,
    forward,
    held_out,
    one_pass,
    switched,
    trained,
)
from peft import PeftModel
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from qtune.memory.engine import Engine
from qtune.memory.gradient_checkpointing import find_layers
from qtune.memory.memory_tracker import block_bytes
from qtune.memory.techniques import Techniques
from qtune.memory.techniques.weight_streaming import spread
from qtune.memory.weight_streaming import ALIGNMENT, LayerStream, Slot, frozen_tensors, layout

STREAMED = Techniques(recomputed_layers=LAYERS, streamed_layers=LAYERS)
READERS = {"aten::mm", "aten::addmm", "aten::bmm"}


class Watch(TorchDispatchMode):
    """Where the arithmetic reads from: the storages of all that bitsandbytes and matrix products are given."""

    def __init__(self) -> None:
        super().__init__()
        self.read: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._overloadpacket._qualified_op_name
        if name in READERS or name.startswith("bitsandbytes::"):
            tensors = (leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, torch.Tensor))
            self.read |= {tensor.untyped_storage().data_ptr() for tensor in tensors}
        return func(*args, **(kwargs or {}))


def places(buffers: list[torch.Tensor]) -> set[int]:
    return {buffer.untyped_storage().data_ptr() for buffer in buffers}


def bits(model: PeftModel) -> list[torch.Tensor]:
    """A copy of everything that can be streamed."""
    return [tensor.clone() for layer in find_layers(model) for tensor, _ in frozen_tensors(layer)]


@pytest.mark.parametrize(
    ("streamed", "kind", "dtype", "nf4", "autocast"),
    crossed(
        [1, 2, 3, LAYERS],
        [
            ("llama", torch.float64, None, None),
            ("gemma3", torch.float32, "double", None),
            ("qwen2", torch.float32, "single", None),
            ("phi3", torch.bfloat16, "double", torch.bfloat16),
            ("qwen3 moe", torch.float32, "double", None),
        ],
    ),
)
def test_equal_to_the_bit_and_nothing_is_worn_out(streamed, kind, dtype, nf4, autocast) -> None:
    plain, ours = adapted(base(kind, dtype, nf4)), adapted(base(kind, dtype, nf4))
    Engine(plain)
    before = bits(ours)
    switched(ours, Techniques(recomputed_layers=LAYERS, streamed_layers=streamed))
    for inputs in (batch(), batch((63,))):
        assert_equal(one_pass(ours, inputs, autocast), one_pass(plain, inputs, autocast))
        assert held_out(ours, batch()) == held_out(plain, batch())
    assert all(torch.equal(now, then) for now, then in zip(bits(ours), before, strict=True))


@pytest.mark.parametrize(("kind", "nf4"), [("llama", "double"), ("qwen3", None), ("qwen3 moe", "double")])
def test_two_layers_at_a_time_and_no_arithmetic_reads_the_host(kind, nf4) -> None:
    model = adapted(base(kind, nf4=nf4))
    stream = switched(model, STREAMED).runner.stream
    largest = max(home.numel() for home in stream.homes("host"))
    prompt = {"input_ids": batch()["input_ids"][:, :9], "max_new_tokens": 3, "do_sample": False, "use_cache": True}
    for act in (
        lambda: one_pass(model, batch()),
        lambda: held_out(model, batch()),
        lambda: model.eval().generate(**prompt),
    ):
        with Watch() as watch:
            act()
        assert places(stream.slots) <= watch.read
        assert not places(stream.homes("host")) & watch.read
        assert [slot.numel() for slot in stream.slots] == [largest] * 2


def test_packed_weights_have_no_other_home() -> None:
    """What is counted: every storage of the streamed weights that a parameter could still hold on to."""
    model = adapted(base("llama", nf4="double"))
    stream = switched(model, STREAMED).runner.stream
    one_pass(model, batch())
    held = {tensor.untyped_storage().data_ptr() for layer in find_layers(model) for tensor, _ in frozen_tensors(layer)}
    assert held <= places(stream.homes("host")) | places(stream.slots)
    assert len(held & places(stream.slots)) == 2


def test_between_forward_and_backward_the_graph_holds_no_layer() -> None:
    """bitsandbytes' own function would hold each layer's packed weights until its gradient is due."""
    model = adapted(base("llama", nf4="double"))
    stream = switched(model, STREAMED).runner.stream
    nats = forward(model.train(), batch())
    assert [slot.layer for slot in stream._slots].count(LAYERS - 1) == 1
    for slot in stream.slots:
        slot.fill_(0)  # whoever held a view of it would see nothing but zeros
    for slot in stream._slots:
        slot.layer = None
    nats.backward()
    expected = adapted(base("llama", nf4="double"))
    Engine(expected)
    forward(expected.train(), batch()).backward()
    for mine, theirs in zip(trained(model), trained(expected), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


def test_steps_train_the_adapter_alone() -> None:
    plain, ours = adapted(base("llama", nf4="double")), adapted(base("llama", nf4="double"))
    Engine(plain)
    switched(ours, STREAMED)
    before = bits(ours)
    for model in (plain, ours):
        optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
        for seed in range(3):
            forward(model.train(), batch(seed=seed)).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(trained(ours), trained(plain), strict=True))
    assert all(torch.equal(now, then) for now, then in zip(bits(ours), before, strict=True))


def test_switched_on_in_the_middle_of_a_run_and_with_dropout() -> None:
    plain = adapted(base("llama", nf4="double"), lora_dropout=0.2)
    ours = adapted(base("llama", nf4="double"), lora_dropout=0.2)
    Engine(plain)
    engine = Engine(ours)
    for techniques in (Techniques(), Techniques(recomputed_layers=LAYERS), STREAMED, STREAMED):
        engine.switch_to(techniques)
        passes = []
        for model in (plain, ours):
            torch.manual_seed(4)
            passes.append(one_pass(model, batch()))
        assert_equal(passes[1], passes[0])


def test_saved_adapters_are_the_same(tmp_path) -> None:
    plain, ours = adapted(base("llama", nf4="double")), adapted(base("llama", nf4="double"))
    switched(ours, STREAMED)
    one_pass(ours, batch())
    for name, model in (("plain", plain), ("ours", ours)):
        model.save_pretrained(tmp_path / name)
    saved = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "ours")]
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(saved[1][name], tensor) for name, tensor in saved[0].items())


def test_a_copy_that_fails_leaves_nobody_in_the_slot(monkeypatch) -> None:
    model = adapted(base("llama", nf4="double"))
    engine = switched(model, STREAMED)
    expected = one_pass(model, batch())
    home, copies = engine.runner.stream.homes("host")[2], []

    class Failing(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.copy_.default and args[1].data_ptr() == home.data_ptr():
                copies.append(1)
                raise RuntimeError("injected")
            return func(*args, **(kwargs or {}))

    with Failing(), pytest.raises(RuntimeError, match="injected"):
        one_pass(model, batch())
    assert copies == [1]
    engine.forget_pass()
    model.zero_grad()
    assert_equal(one_pass(model, batch()), expected)


def test_layers_between_streamed_ones_stay_where_they_are() -> None:
    model = adapted(base("llama", nf4="double"))
    before = [{t.data_ptr() for t, _ in frozen_tensors(layer)} for layer in find_layers(model)]
    switched(model, Techniques(recomputed_layers=LAYERS, streamed_layers=2))
    one_pass(model, batch())
    after = [{t.data_ptr() for t, _ in frozen_tensors(layer)} for layer in find_layers(model)]
    assert [before[i] == after[i] for i in range(LAYERS)] == [i not in spread(2, LAYERS) for i in range(LAYERS)]


@pytest.mark.parametrize("layers", [1, 2, 7, 32])
def test_streamed_layers_are_spread_evenly(layers) -> None:
    for streamed in range(layers + 1):
        found = spread(streamed, layers)
        assert len(set(found)) == len(found) == streamed
        assert all(0 <= index < layers for index in found)
        gaps = [b - a for a, b in pairwise(found)]
        assert not gaps or max(gaps) - min(gaps) <= 1


def test_a_buffer_holds_a_layer_in_aligned_pieces() -> None:
    layer = find_layers(adapted(base("llama", nf4="double")))[0]
    pieces, size = layout(layer)
    tensors = [tensor for tensor, _ in frozen_tensors(layer)]
    assert len(pieces) == len(tensors) == 7 * 3  # weights, scales, scales of scales
    assert all(piece.start % ALIGNMENT == 0 for piece in pieces)
    assert sum(piece.bytes for piece in pieces) == sum(tensor.nbytes for tensor in tensors)
    assert size < sum(tensor.nbytes for tensor in tensors) + len(pieces) * ALIGNMENT
    ends = [piece.start + piece.bytes for piece in pieces]
    assert all(end <= piece.start for end, piece in zip(ends, pieces[1:], strict=False))


def test_answers_alone_need_no_recomputation() -> None:
    plain, ours = adapted(base("llama", nf4="double")), adapted(base("llama", nf4="double"))
    switched(ours, Techniques(streamed_layers=LAYERS))
    assert held_out(ours, batch()) == held_out(plain, batch())
    prompt = {"input_ids": batch()["input_ids"][:, :9], "max_new_tokens": 4, "do_sample": False, "use_cache": True}
    assert torch.equal(ours.generate(**prompt), plain.eval().generate(**prompt))
    assert_close(one_pass(ours, batch()), one_pass(plain, batch()), 1e-5)


@pytest.mark.parametrize("streamed", [1, 2, 3, LAYERS])
def test_in_answers_the_first_layer_follows_the_last(streamed: int, monkeypatch) -> None:
    """Every token waited for the first layer: it was copied when it was asked for."""
    model = adapted(base("llama", nf4="double"))
    switched(model, Techniques(streamed_layers=streamed, recomputed_layers=LAYERS))
    exposed: list[int] = []
    load = LayerStream._load

    def watched(self: LayerStream, index: int, not_slot: Slot | None) -> Slot:
        if not_slot is None:
            exposed.append(index)
        return load(self, index, not_slot)

    monkeypatch.setattr(LayerStream, "_load", watched)
    for _ in range(4):
        held_out(model, batch((9,)))
    assert exposed == [spread(streamed, LAYERS)[0]]
    exposed.clear()
    for _ in range(2):
        one_pass(model, batch((9,)))
    assert exposed == []


@pytest.mark.parametrize(("streamed", "slots"), [(0, 0), (1, 1), (2, 2), (4, 2)])
def test_a_forecast_has_as_many_buffers_as_there_will_be(streamed: int, slots: int) -> None:
    """A lone streamed layer has one to itself: a second was promised room that nothing takes."""
    layer = STANDING.layers[0]
    on = Techniques(streamed_layers=streamed, recomputed_layers=len(STANDING.layers))
    parts = on.on_device(STANDING)
    assert parts.get("streamed layers", 0) == slots * block_bytes(layer.packed_bytes)
    assert parts["base"] == STANDING.base_bytes - streamed * layer.resident_bytes
    assert on.on_host(STANDING).get("streamed layers", 0) == streamed * block_bytes(layer.packed_bytes)
