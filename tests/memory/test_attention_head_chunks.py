"""Attention a few heads at a time: the loss and gradients of all heads at once."""

import pytest
import torch
from made_models import LAYERS, adapted, assert_close, base, batch, held_out, one_pass, switched
from transformers import LlamaConfig, LlamaForCausalLM, Olmo2Config, Olmo2ForCausalLM

from qtune.memory import fused_cross_entropy, packed_attention
from qtune.memory.attention_head_chunks import most_groups, why_not_grouped
from qtune.memory.engine import refusals
from qtune.memory.gradient_checkpointing import find_layers
from qtune.memory.memory_tracker import LiveBytes
from qtune.memory.techniques import Techniques


@pytest.mark.parametrize("recomputed", [0, LAYERS])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "gemma3", "granite"])
def test_in_float64(kind, recomputed) -> None:
    plain, ours = adapted(base(kind, torch.float64)), adapted(base(kind, torch.float64))
    switched(ours, Techniques(recomputed_layers=recomputed, head_groups=2))
    for inputs in (batch(), batch((63,))):
        assert_close(one_pass(ours, inputs), one_pass(plain, inputs), 1e-12)
        assert held_out(ours, inputs) == pytest.approx(held_out(plain, inputs), rel=1e-12)


@pytest.mark.parametrize("nf4", ["double", "single"])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3 moe"])
def test_on_an_nf4_base(kind, nf4) -> None:
    plain, ours = adapted(base(kind, nf4=nf4)), adapted(base(kind, nf4=nf4))
    switched(ours, Techniques(head_groups=2))
    assert_close(one_pass(ours, batch()), one_pass(plain, batch()), 1e-5)


@pytest.mark.parametrize("groups", [2, 4, 8])
def test_any_number_of_groups_and_again_another(groups) -> None:
    def build():
        torch.manual_seed(0)
        packed_attention.register()
        config = LlamaConfig(
            vocab_size=262,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=8,
            use_cache=False,
        )
        model = LlamaForCausalLM._from_config(config, attn_implementation=packed_attention.NAME)
        fused_cross_entropy.install(model)
        return adapted(model.double().requires_grad_(False))

    plain, ours = build(), build()
    assert most_groups(find_layers(ours)[0]) == 8
    engine = switched(ours, Techniques(head_groups=4))
    one_pass(ours, batch())
    engine.switch_to(Techniques(head_groups=groups))
    assert_close(one_pass(ours, batch()), one_pass(plain, batch()), 1e-12)


def test_in_bfloat16_nothing_is_rounded_otherwise() -> None:
    """Summed up group by group, outputs and gradients made losses that were 4.8e-3 apart after five steps."""
    results = []
    for techniques in (Techniques(), Techniques(head_groups=2)):
        model = adapted(base("llama", torch.bfloat16, nf4="double"))
        switched(model, techniques)
        results.append(one_pass(model, batch()))
    assert_close(results[1], results[0], 1e-6)


def test_memory_of_attention_is_that_of_a_group() -> None:
    inputs, peaks = batch((512,)), []
    for groups in (1, 2):
        model = adapted(base("llama"))
        switched(model, Techniques(recomputed_layers=LAYERS, tile_tokens=16, head_groups=groups))
        one_pass(model, inputs)
        with LiveBytes() as counter:
            one_pass(model, inputs)
        peaks.append(counter.peaks["backward 1"].device_bytes)
    assert peaks[0] - peaks[1] > 512 * 64 * 4


def layer_of(model) -> torch.nn.Module:
    return find_layers(adapted(model))[0]


def test_what_cannot_be_grouped_says_why() -> None:
    assert why_not_grouped(layer_of(base("llama"))) is None
    assert "four plain projections" in why_not_grouped(layer_of(base("phi3")))
    dropping = base("llama")
    dropping.model.layers[0].self_attn.attention_dropout = 0.1  # the second run would draw other masks
    assert why_not_grouped(layer_of(dropping)) == "its attention drops out weights"
    with_sinks = base("llama")
    with_sinks.model.layers[0].self_attn.sinks = torch.nn.Parameter(torch.zeros(4), requires_grad=False)
    assert why_not_grouped(layer_of(with_sinks)) == "its attention has parameters of its own"
    for more, why in (
        ({"lora_dropout": 0.1}, "drops out inputs"),
        ({"use_dora": True}, "not plain LoRA"),
        ({"lora_bias": True}, "has a bias"),
        ({"target_modules": ["q_proj"]}, "no adapter"),
    ):
        assert why in why_not_grouped(find_layers(adapted(base("llama"), **more))[0])


def test_one_layer_of_another_kind_is_enough_to_refuse() -> None:
    """MiniMax alternates attention with a kind that has no heads: `no attribute 'k_proj'` in the second layer."""
    model = base("llama")
    model.model.layers[2].self_attn.attention_dropout = 0.1
    assert refusals(adapted(model))["head_groups"] == "its attention drops out weights"


def test_norms_over_all_heads_cannot_be_grouped() -> None:
    packed_attention.register()
    shape = {"vocab_size": 262, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    config = Olmo2Config(**shape, num_attention_heads=4, num_key_value_heads=2)
    model = Olmo2ForCausalLM._from_config(config, attn_implementation=packed_attention.NAME).requires_grad_(False)
    assert why_not_grouped(layer_of(model)) == "its attention norms all heads together"


def test_one_key_value_head_cannot_be_grouped() -> None:
    packed_attention.register()
    shape = {"vocab_size": 262, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    config = LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=1)
    assert why_not_grouped(layer_of(LlamaForCausalLM(config).requires_grad_(False))) == "it has one key/value head"


def test_heads_that_start_inside_a_block_of_nf4_cannot_be_grouped() -> None:
    """A head of 4 rows of 24 weights is one and a half blocks of 64."""
    from made_models import quantize

    packed_attention.register()
    config = LlamaConfig(
        vocab_size=262,
        hidden_size=24,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
    )
    model = LlamaForCausalLM(config)
    quantize(model, torch.float32, double=True)
    why = why_not_grouped(layer_of(model.requires_grad_(False)))
    assert why == "its heads do not start on a block of the quantised weights"
