"""Layers run again in the backward pass: to the bit what they are without, their inputs here or in host memory."""

import gc

import pytest
import torch
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
from transformers import CodeGenConfig, CodeGenForCausalLM

from qtune.memory import fused_cross_entropy
from qtune.memory.engine import Engine, refusals
from qtune.memory.gradient_checkpointing import find_layers
from qtune.memory.memory_tracker import LiveBytes
from qtune.memory.techniques import Techniques

RECOMPUTED = Techniques(recomputed_layers=LAYERS)
ON_HOST = Techniques(recomputed_layers=LAYERS, host_checkpoints=True)
SOME = Techniques(recomputed_layers=2, host_checkpoints=True)


def seeded(model, inputs, autocast=None):
    torch.manual_seed(3)
    return one_pass(model, inputs, autocast)


KEPT = {"here": RECOMPUTED, "on the host": ON_HOST, "some on the host": SOME}


@pytest.mark.parametrize(
    ("kept", "kind", "dtype", "nf4", "autocast", "dropout"),
    crossed(
        [*KEPT],
        [
            ("llama", torch.float64, None, None, 0.0),
            ("qwen3", torch.float32, "single", None, 0.0),
            ("gemma3", torch.float32, "double", None, 0.2),
            ("mistral", torch.bfloat16, "double", torch.bfloat16, 0.0),
            ("phi3", torch.float32, None, torch.float16, 0.2),
            ("qwen3 moe", torch.float32, "double", None, 0.0),
            ("gemma3n", torch.float64, None, None, 0.0),
            ("gemma4", torch.float32, "double", None, 0.0),
            ("gemma4", torch.bfloat16, "double", torch.bfloat16, 0.2),
        ],
    ),
)
def test_equal_to_the_bit(kept, kind, dtype, nf4, autocast, dropout) -> None:
    more = {"lora_dropout": dropout, "target_parameters": None} if dropout else {}
    plain, ours = adapted(base(kind, dtype, nf4), **more), adapted(base(kind, dtype, nf4), **more)
    Engine(plain)
    switched(ours, KEPT[kept])
    for inputs in (batch(), batch((63,)), batch((7,)), batch()):  # host buffers are larger than the third asks for
        assert_equal(seeded(ours, inputs, autocast), seeded(plain, inputs, autocast))


def test_dropout_goes_on_as_if_nothing_had_run_again() -> None:
    """The random numbers after a pass are those after a pass without recomputation."""
    after = []
    for techniques in (Techniques(), ON_HOST):
        model = adapted(base("llama"), lora_dropout=0.2)
        switched(model, techniques)
        seeded(model, batch())
        after.append(torch.rand(3))
    assert torch.equal(*after)


def test_a_rate_in_the_config_counts_as_dropout() -> None:
    """Found on BioGPT, whose layers call F.dropout themselves: other masks in the backward pass, and no error."""
    plain = base("llama")
    assert not Engine(adapted(plain)).runner.keeps_random_state
    for name in ("attention_dropout", "hidden_dropout", "router_jitter_noise"):
        model = base("llama")
        setattr(model.config, name, 0.1)
        assert Engine(adapted(model)).runner.keeps_random_state


@pytest.mark.parametrize("techniques", [RECOMPUTED, ON_HOST], ids=["here", "on the host"])
def test_attention_dropout_has_the_same_masks_again(techniques) -> None:
    models = []
    for on in (Techniques(), techniques):
        model = base("llama")
        model.config.attention_dropout = 0.3
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.3
        models.append(adapted(model))
        switched(models[-1], on)
    assert_equal(seeded(models[1], batch((63,))), seeded(models[0], batch((63,))))


def test_without_gradients_and_in_eval_mode_nothing_runs_again() -> None:
    model = adapted(base("llama"))
    switched(model, ON_HOST)
    calls = []
    for layer in find_layers(model):
        layer.mlp.gate_proj.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        forward(model.train(), batch())
    held_out(model, batch())
    assert len(calls) == 2 * LAYERS
    one_pass(model, batch())
    assert len(calls) == 4 * LAYERS


def test_an_evaluation_between_forward_and_backward_disturbs_nothing() -> None:
    model = adapted(base("llama"))
    switched(model, ON_HOST)
    expected = one_pass(model, batch())
    nats = forward(model.train(), batch())
    held_out(model, batch((40,), seed=2))
    model.train()
    nats.backward()
    for parameter, gradient in zip(trained(model), expected.gradients.values(), strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_what_is_kept_between_the_passes_is_one_input_a_layer_or_none() -> None:
    hidden, inputs = 64 * 64 * 4, batch((64,))
    held, most = [], []
    for techniques in (RECOMPUTED, ON_HOST):
        model = adapted(base("llama"))
        switched(model, techniques)
        one_pass(model, inputs)
        with LiveBytes() as counter:
            nats = forward(model.train(), inputs)
            held.append(counter.held())
            nats.backward()
        most.append(max(peak.device.get("checkpoints", 0) for peak in counter.peaks.values()))
    assert held[0]["checkpoints"] == LAYERS * hidden
    assert sum(held[0].values()) - sum(held[1].values()) == LAYERS * hidden
    assert most == [LAYERS * hidden, 2 * hidden]


def test_host_buffers_grow_with_the_longest_batch_and_are_used_again() -> None:
    model = adapted(base("llama"))
    host = switched(model, ON_HOST).runner.host
    sizes = []
    for length in (20, 50, 20, 50):
        one_pass(model, batch((length,)))
        sizes.append([host._buffers[i].data_ptr() for i in range(LAYERS)])
        assert not host._kept
        assert not host._coming
    assert sizes[1] == sizes[2] == sizes[3]
    assert [host._buffers[i].numel() for i in range(LAYERS)] == [50 * 64] * LAYERS


def test_layers_that_return_a_tuple() -> None:
    """Found on Bamba and CodeGen: `_Recomputed.backward() takes 2 positional arguments but 3 were given`."""

    def build() -> PeftModel:
        torch.manual_seed(0)
        config = CodeGenConfig(vocab_size=262, n_embd=64, n_layer=LAYERS, n_head=4, rotary_dim=8, n_positions=512)
        model = CodeGenForCausalLM(config).requires_grad_(False)
        model.config.use_cache = False
        fused_cross_entropy.install(model)
        return adapted(model)

    plain, ours = build(), build()
    switched(ours, ON_HOST)
    assert len(find_layers(ours)) == LAYERS
    inputs = {name: value for name, value in batch((40,)).items() if name != "document_lengths"}
    assert_close(one_pass(ours, inputs), one_pass(plain, inputs), 1e-5)


@pytest.mark.parametrize("kind", ["gemma3n", "gemma4"])
def test_layers_that_share_keys_allow_every_technique_but_groups(kind: str) -> None:
    """A recomputed layer's keys had no gradient for the layers above that read them, and an input of its own of each
    layer was gone back through twice."""
    plain, ours = adapted(base(kind)), adapted(base(kind))
    assert set(refusals(ours)) == {"head_groups"}
    Engine(plain)
    switched(ours, Techniques(LAYERS, True, 16, True, "host", LAYERS))
    for inputs in (batch(), batch((20,))):
        assert_close(one_pass(ours, inputs), one_pass(plain, inputs), 2e-5)
    assert abs(held_out(ours, batch()) - held_out(plain, batch())) < 1e-3


def test_a_pass_through_layers_that_share_keys_leaves_nothing_behind() -> None:
    """What the layers share leads back to the layers; kept by them it would be a ring that no reference count frees."""
    model = adapted(base("gemma4"))
    switched(model, RECOMPUTED)
    gc.collect()
    gc.disable()
    try:
        with LiveBytes() as counter:
            one_pass(model, batch())
            before = sum(counter.held().values())
            one_pass(model, batch())
            assert sum(counter.held().values()) <= before
    finally:
        gc.enable()
