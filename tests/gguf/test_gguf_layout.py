"""Names, permutation and RoPE of the architectures llama.cpp shares with transformers."""

import math

import pytest
import torch
from gguf import GGUFWriter
from made_bases import KINDS, LLAMA_3_ROPE, SIZES
from transformers import AutoConfig, AutoModelForCausalLM

from qtune.errors import ModelError
from qtune.gguf.layout import ROPE_FACTORS, TOKEN_EMBEDDING, Layout


def config(kind: str = "llama", **changes: object) -> object:
    return AutoConfig.for_model(**{**SIZES, "vocab_size": 64, **KINDS[kind], **changes})


def stored(settings: object) -> list[str]:
    """What save_pretrained would store."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings)
    tied = settings.tie_word_embeddings  # type: ignore[attr-defined]
    return [name for name in model.state_dict() if not (tied and name == "lm_head.weight")]


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_has_a_place_of_its_own(kind) -> None:
    settings = config(kind)
    names = Layout.of(settings).names(stored(settings))
    assert len(set(names.values())) == len(names) == len(stored(settings))
    assert names["model.layers.3.self_attn.o_proj.weight"] == "blk.3.attn_output.weight"
    assert ("output.weight" in names.values()) is not settings.tie_word_embeddings


def test_a_tied_head_is_left_out_or_is_the_embedding() -> None:
    settings = config("llama tied")
    layout, names = Layout.of(settings), stored(settings)
    assert "lm_head.weight" not in layout.names([*names, "lm_head.weight"])
    without = [name for name in names if "embed_tokens" not in name]
    assert layout.names([*without, "lm_head.weight"])["lm_head.weight"] == TOKEN_EMBEDDING
    with pytest.raises(ModelError, match=r"nothing for token_embd\.weight"):
        layout.names(without)


def test_a_tensor_without_a_place_and_a_place_without_a_tensor_are_named() -> None:
    settings = config("qwen2")
    layout, names = Layout.of(settings), stored(settings)
    assert layout.names([*names, "model.layers.0.self_attn.rotary_emb.inv_freq"]) == layout.names(names)
    with pytest.raises(ModelError, match=r"model\.layers\.0\.self_attn\.sinks: no qwen2"):
        layout.names([*names, "model.layers.0.self_attn.sinks"])
    with pytest.raises(ModelError, match=r"nothing for blk\.2\.attn_k\.bias"):
        layout.names([name for name in names if name != "model.layers.2.self_attn.k_proj.bias"])


def test_channels_that_turn_together_become_neighbours() -> None:
    layout = Layout.of(config(num_attention_heads=2, num_key_value_heads=1, hidden_size=8, head_dim=4))
    rows = torch.arange(8.0)[:, None].expand(8, 3)
    name = "model.layers.0.self_attn.{}_proj.weight"
    assert layout.arranged(name.format("q"), rows)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert layout.arranged(name.format("k"), rows[:4])[:, 0].tolist() == [0, 2, 1, 3]
    assert layout.arranged("model.layers.0.self_attn.q_proj.bias", rows[:, 0]).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert torch.equal(layout.arranged(name.format("v"), rows), rows)
    assert torch.equal(Layout.of(config("qwen3")).arranged(name.format("q"), rows), rows)


def test_llama_3s_factors_by_hand() -> None:
    """From the model's own description: long waves are divided by 8, short ones by 1, and between the two smoothly."""
    layout = Layout.of(config("llama 3", head_dim=16))
    factors = layout.rope_factors()
    assert factors is not None
    for channel, factor in enumerate(factors.tolist()):
        wave = 2 * math.pi * 10000 ** (2 * channel / 16)
        smooth = (64 / wave - LLAMA_3_ROPE["low_freq_factor"]) / 3
        expected = 1 if wave < 64 / 4 else 8 if wave > 64 / 1 else 1 / ((1 - smooth) / 8 + smooth)
        assert factor == pytest.approx(expected, rel=1e-5)
    assert factors.min() == pytest.approx(1)
    assert factors.max() == pytest.approx(8)
    assert Layout.of(config()).rope_factors() is None
    assert ROPE_FACTORS == "rope_freqs.weight"


def test_a_sliding_window_is_where_the_context_ends() -> None:
    assert Layout.of(config("mistral", sliding_window=128)).context_tokens == 128
    assert Layout.of(config("mistral")).context_tokens == 512
    assert Layout.of(config("qwen2", sliding_window=128)).context_tokens == 512


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"original_max_position_embeddings": 128}, (128, 32.0, 1.0)),  # the paper's own where the base names none
        ({"original_max_position_embeddings": 64, "beta_fast": 24.0, "beta_slow": 2.0}, (64, 24.0, 2.0)),
    ],
)
def test_a_stretched_context_is_described_as_the_base_has_it(given: dict[str, float], said: tuple[float, ...]) -> None:
    """With others a file loads, and answers worse the longer the text."""
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e5, **given}
    layout, writer = Layout.of(config(rope_parameters=rope)), GGUFWriter(None, "llama")
    layout.describe(writer, 64)
    (values,) = writer.kv_data
    scaling = [values[f"llama.rope.scaling.{key}"].value for key in ("type", "factor")]
    assert [*scaling, values["llama.rope.freq_base"].value] == ["yarn", 4.0, 5e5]
    keys = ("original_context_length", "yarn_beta_fast", "yarn_beta_slow")
    assert tuple(values[f"llama.rope.scaling.{key}"].value for key in keys) == said


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model_type": "gemma2"}, "gemma2 models cannot be exported to GGUF yet; llama, mistral, qwen2, qwen3"),
        ({"model_type": "llama", "hidden_act": "gelu"}, "hidden_act is gelu"),
        (
            {"model_type": "llama", "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "dynamic",
        ),
        (
            {
                "model_type": "llama",
                "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5, "rope_theta": 1e4},
            },
            "only a part of each head is rotated",
        ),
        (
            {
                "model_type": "llama",
                "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "rope_theta": 1e4},
            },
            "its yarn scaling sets an attention factor",
        ),
        ({"model_type": "smollm3", "no_rope_layers": [1, 0, 1, 0]}, "no_rope_layers is not every 4th"),
    ],
)
def test_what_llama_cpp_would_not_follow_is_refused_by_name(settings, said) -> None:
    with pytest.raises(ModelError, match=said):
        Layout.of(AutoConfig.for_model(**{**SIZES, "vocab_size": 64, **settings}))
