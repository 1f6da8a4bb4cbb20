"""The adapter's arithmetic, from its files alone, beside peft's own."""

import pytest
import torch
from made_runs import edit_json, make_run
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qtune.errors import ModelError
from qtune.merge.lora_delta import AdapterWeights, LoraDelta

KINDS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 7},
        "alpha_pattern": {"q_proj": 3, "layers.0.self_attn.v_proj": 5},
    },
    "patterns with rslora": {"use_rslora": True, "rank_pattern": {"down_proj": 1}, "alpha_pattern": {"o_proj": 32}},
}


@pytest.mark.parametrize("lora", KINDS.values(), ids=KINDS.keys())
def test_every_change_is_pefts(tiny_base, tmp_path, lora) -> None:
    run = make_run(tmp_path / "run", tiny_base, lora, quantization="none", compute_dtype="float32")
    plain = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    originals = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    merged = PeftModel.from_pretrained(plain, run.adapter).merge_and_unload().state_dict()
    changes = AdapterWeights.read(run.adapter).changes
    assert len(changes) == 14
    for module, change in changes.items():
        name = f"{module}.weight"
        assert (merged[name] - originals[name]).abs().max() > 1e-2
        torch.testing.assert_close(change.apply(originals[name]), merged[name], rtol=0, atol=1e-6)


def test_a_change_by_hand() -> None:
    change = LoraDelta(a=torch.tensor([[1.0, 2.0]]), b=torch.tensor([[3.0], [0.0]]), scale=0.5)
    weight = torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=torch.bfloat16)
    assert change.apply(weight).tolist() == [[2.5, 4.0], [1.0, 1.0]]
    assert change.fits((2, 2))
    assert not change.fits((2, 3))


def test_half_a_pair_is_named(tiny_base, tmp_path) -> None:
    run = make_run(tmp_path / "run", tiny_base, quantization="none")
    path = run.adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors["base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"]
    save_file(tensors, path)
    with pytest.raises(ModelError, match=r"layers\.1\.self_attn\.k_proj has lora_A"):
        AdapterWeights.read(run.adapter)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"peft_type": "LOHA"}, "peft_type = 'LOHA'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"lora_bias": True}, "lora_bias = True"),
    ],
)
def test_another_method_is_refused_by_name(tiny_base, tmp_path, changes, named) -> None:
    run = make_run(tmp_path / "run", tiny_base, quantization="none")
    edit_json(run.adapter / "adapter_config.json", **changes)
    with pytest.raises(ModelError, match=named):
        AdapterWeights.read(run.adapter)


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(tiny_base, tmp_path, missing) -> None:
    run = make_run(tmp_path / "run", tiny_base, quantization="none")
    (run.adapter / missing).unlink()
    with pytest.raises(ModelError, match=missing):
        AdapterWeights.read(run.adapter)


def test_a_cut_file_is_named(tiny_base, tmp_path) -> None:
    run = make_run(tmp_path / "run", tiny_base, quantization="none")
    path = run.adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ModelError, match=f"{path.name}: cannot be read"):
        AdapterWeights.read(run.adapter)
