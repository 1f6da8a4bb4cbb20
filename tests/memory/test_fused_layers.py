"""Norms, rotary embeddings and gated MLPs are known by what they compute; what is not known is left as it is."""

import types

import pytest
import torch
from made_models import KINDS, LAYERS, adapted, assert_close, batch, held_out, one_pass
from made_models import base as known_base
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from qtune.memory import fused_layers
from qtune.memory.fused_layers import install, is_lean
from qtune.memory.gradient_checkpointing import find_layers

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 262}
A_LAYER = {  # norms, attentions and MLPs that are known in one
    "llama": (2, 1, 1),
    "qwen2": (2, 1, 1),
    "qwen3": (4, 1, 1),
    "mistral": (2, 1, 1),
    "phi3": (2, 1, 1),
    "gemma3": (6, 1, 1),
    "granite": (2, 1, 1),
    "qwen3 moe": (4, 1, 0),
    "gemma3n": (9, 0, 1),
    "gemma4": (7, 0, 1),
}


def known(module: torch.nn.Module) -> list[str]:
    """Names of the modules in it that run as one operation."""
    return [
        name for name, child in module.named_modules() if isinstance(child.__dict__.get("forward"), types.MethodType)
    ]


@pytest.fixture
def unknown(monkeypatch):
    """Makes a base in which nothing is known."""

    def make(kind: str, *others):
        with monkeypatch.context() as patch:
            patch.setattr(fused_layers, "install", lambda model: None)
            return known_base(kind, *others)

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_known_of_a_layer(kind) -> None:
    model = known_base(kind)
    names = known(find_layers(model)[0])
    found = [sum(part in name for name in names) for part in ("norm", "self_attn", "mlp")]
    norms, attentions, mlps = A_LAYER[kind]
    inner = sum("_norm" in name and "self_attn" in name for name in names)
    assert found == [norms, attentions + inner, mlps]
    assert is_lean(model.get_decoder().norm)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_transformers(kind, unknown) -> None:
    ours, plain = adapted(known_base(kind)), adapted(unknown(kind))
    assert not known(find_layers(plain)[0])
    assert_close(one_pass(ours, batch()), one_pass(plain, batch()), 1e-5)
    assert held_out(ours, batch()) == pytest.approx(held_out(plain, batch()), rel=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_in_bfloat16_a_loss_is_the_same_to_the_bit_and_gradients_to_rounding(kind, unknown) -> None:
    ours, plain = (one_pass(adapted(made(kind, torch.bfloat16)), batch()) for made in (known_base, unknown))
    assert ours.nats == plain.nats
    assert_close(ours, plain, 0.03)


@pytest.mark.parametrize(
    "model",
    [
        lambda: BloomForCausalLM(BloomConfig(vocab_size=262, hidden_size=64, n_layer=2, n_head=4)),
        lambda: OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=128, word_embed_proj_dim=64)),
        lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, intermediate_size=128)),
    ],
    ids=["bloom", "opt", "a part of each head is rotated"],
)
def test_what_computes_otherwise_goes_on_as_it_did(model) -> None:
    torch.manual_seed(0)
    made, ids = model().eval(), batch()["input_ids"]
    expected = made(ids).logits
    install(made)
    assert not [name for name in known(made) if "attention" not in name]
    assert torch.equal(made(ids).logits, expected)


def test_a_rotation_of_neighbours_in_place_of_halves_is_left_alone() -> None:
    model = CohereForCausalLM(CohereConfig(**SIZES, intermediate_size=128))
    install(model)
    assert {name.rsplit(".")[-1] for name in known(model)} == {"mlp"}


class Doubled(LlamaRMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Clamped(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.clamp(-0.1, 0.1))


def test_a_class_that_does_more_than_its_like_is_left_alone() -> None:
    norm, mlp = Doubled(16), Clamped(KINDS["llama"]().config)
    install(torch.nn.ModuleList([norm, mlp]))
    assert not known(norm)
    assert not known(mlp)


def test_a_norm_whose_weight_is_trained_or_of_another_dtype_runs_its_own_forward(monkeypatch) -> None:
    norm, x = LlamaRMSNorm(16), torch.randn(1, 3, 16)
    install(norm)
    monkeypatch.setattr(fused_layers.layer_ops, "rms_norm", lambda *_: 1 / 0)
    norm(x).sum().backward()
    assert norm.weight.grad is not None
    norm.requires_grad_(False)
    assert norm(x.bfloat16()).dtype == torch.float32
    with pytest.raises(ZeroDivisionError):
        norm(x)


def test_nobody_elses_attention_changes_and_no_random_number_is_drawn(unknown) -> None:
    theirs, state = modeling_llama.apply_rotary_pos_emb, torch.get_rng_state()
    plain = unknown("llama")
    torch.set_rng_state(state)
    install(KINDS["llama"]())
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    install(plain)
    assert torch.equal(torch.rand(3), expected)
    assert modeling_llama.apply_rotary_pos_emb is theirs
    assert sum("layers" in name for name in known(plain)) == LAYERS * 4
