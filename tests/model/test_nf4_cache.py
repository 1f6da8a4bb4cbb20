"""A base quantised once: what comes from the cache is to the bit what would be quantised again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, tiny_config
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
)

from qtune import cache_dir
from qtune.memory.packed_experts import is_packed
from qtune.memory.techniques import Techniques
from qtune.model import base, nf4_cache
from qtune.recipe.schema import Model

SMALL = {"vocab_size": 262, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
SMALL |= {"num_key_value_heads": 2, "intermediate_size": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": tiny_config(),
    "tied": Qwen3Config(**SMALL, tie_word_embeddings=True),
    "windows": Gemma3TextConfig(**SMALL, sliding_window=8),
    "experts": Qwen3MoeConfig(**SMALL, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2),
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(cache_dir.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(nf4_cache, "LEAST_BYTES", 0)
    monkeypatch.setattr(nf4_cache, "FILE_BYTES", 50_000)  # several files
    return tmp_path / "cache" / nf4_cache.KIND


def saved(folder: Path, config: PreTrainedConfig) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def state_of(weight: Any) -> dict[str, torch.Tensor]:
    return weight.quant_state.as_dict(packed=True) if is_packed(weight) else {}


def assert_same(one: PreTrainedModel, other: PreTrainedModel) -> None:
    """The same classes, parameters, buffers and settings, what unpacks them included."""
    assert [(name, type(part)) for name, part in one.named_modules()] == [
        (name, type(part)) for name, part in other.named_modules()
    ]
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(one, kind)()), dict(getattr(other, kind)())
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert torch.equal(tensor, theirs[name]), name
            assert (tensor.dtype, tensor.device) == (theirs[name].dtype, theirs[name].device)
            assert tensor.requires_grad is theirs[name].requires_grad is False
            assert type(tensor) is type(theirs[name])
            first, second = state_of(tensor), state_of(theirs[name])
            assert first.keys() == second.keys()
            assert all(torch.equal(first[key], second[key]) for key in first), name
    assert one.config.to_dict() == other.config.to_dict()
    assert one.generation_config.to_dict() == other.generation_config.to_dict()
    assert one.training is other.training is False


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("double", [True, False])
def test_a_base_from_the_cache_is_the_base(tmp_path: Path, home: Path, name: str, double: bool) -> None:
    folder = saved(tmp_path / "base", CONFIGS[name])
    spec = Model(base=str(folder), double_quantization=double)
    plain = base.load_base(spec, "cpu", "float32")
    (entry,) = cache_dir.entries()
    assert (entry.kind, entry.what) == ("nf4", str(folder))
    for path in folder.glob("*.safetensors"):  # that nothing of them is read
        content = path.stat()
        path.write_bytes(path.read_bytes()[:1000] + bytes(content.st_size - 1000))
    place = nf4_cache.Place(entry.path.name, str(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nf4_cache, "place_of", lambda *_: place)
        kept = base.load_base(spec, "cpu", "float32")
    assert_same(plain, kept)
    row = torch.tensor([[5, 9, 70, 31, 2]])
    assert torch.equal(plain(row).logits, kept(row).logits)
