"""A base quantised once: what comes from the cache is to the bit what would be quantised again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, tiny_config
from stopped_runs import qtune, write_recipe
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
from qtune.model import base, nf4_cache
from qtune.recipe.schema import Model
from qtune.report import run_record
from qtune.rundir import RunDir

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


def keys(home: Path) -> set[str]:
    return {path.name for path in home.iterdir()}


def test_another_base_or_setting_is_another_entry(tmp_path: Path, home: Path) -> None:
    folder = saved(tmp_path / "base", tiny_config())

    def load(**changes: object) -> int:
        """How many entries there are then."""
        dtype = str(changes.pop("dtype", "float32"))
        base.load_base(Model(base=str(folder), **changes), "cpu", dtype)
        return len(keys(home))

    assert [load(), load(), load(double_quantization=False), load(dtype="bfloat16"), load()] == [1, 1, 2, 3, 3]
    assert load(quantization="none") == 3
    config = (folder / "config.json").read_text(encoding="utf-8")
    (folder / "config.json").write_text(config.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert load() == 4
    other = AutoModelForCausalLM.from_pretrained(folder)
    other.model.layers[1].mlp.down_proj.weight.data[5, 7] += 0.5
    other.save_pretrained(folder)
    assert load() == 5


def test_a_broken_entry_is_made_again(tmp_path: Path, home: Path) -> None:
    spec = Model(base=str(saved(tmp_path / "base", tiny_config())))
    plain = base.load_base(spec, "cpu", "float32")
    (entry,) = home.iterdir()
    file = sorted(entry.glob("*.safetensors"))[1]
    content = bytearray(file.read_bytes())
    content[-9] ^= 4
    file.write_bytes(content)
    assert_same(plain, base.load_base(spec, "cpu", "float32"))
    assert file.read_bytes() != content


@pytest.mark.parametrize("why", ["off", "small", "code", "room"])
def test_what_is_not_kept(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    spec = Model(base=str(saved(tmp_path / "base", tiny_config())), trust_remote_code=why == "code")
    if why == "off":
        monkeypatch.setenv(cache_dir.VARIABLE, cache_dir.OFF)
    if why == "small":
        monkeypatch.setattr(nf4_cache, "LEAST_BYTES", 1 << 28)
    if why == "room":
        monkeypatch.setenv(cache_dir.SIZE_VARIABLE, "20KB")
    base.load_base(spec, "cpu", "float32")
    assert not home.exists() or not list(home.iterdir())


def test_a_run_goes_on_from_the_cache_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path / "base", CONFIGS["experts"])
    losses = []
    for number, cache in enumerate((cache_dir.OFF, str(tmp_path / "cache"), str(tmp_path / "cache"))):
        monkeypatch.setenv(cache_dir.VARIABLE, cache)
        recipe = write_recipe(tmp_path, folder, train={"max_steps": 2, "gradient_accumulation": 1})
        assert qtune("run", recipe, "--output", tmp_path / f"run{number}") == 0
        losses.append(run_record.read(RunDir(tmp_path / f"run{number}")).losses)
    assert losses[0] == losses[1] == losses[2] != []
    assert [entry.kind for entry in cache_dir.entries()].count("nf4") == 1
