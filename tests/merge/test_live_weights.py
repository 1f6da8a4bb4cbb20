"""The weights the live model computes with: each against the model's own forward pass."""

from pathlib import Path

import pytest
import torch
from made_runs import make_run
from peft import PeftModel

from qtune.merge.live_weights import held, is_folded, layer_called, noise, tuned
from qtune.model import adapter, base
from qtune.model.open_model import model_of

VALUE = "model.layers.1.self_attn.v_proj"


def live(tiny_base: Path, tmp_path: Path, lora: dict | None = None, **settings: str) -> PeftModel:
    run = make_run(tmp_path / "run", tiny_base, lora, compute_dtype="float32", **settings)
    return adapter.load(base.load_base(model_of(run), "cpu", "float32"), run.adapter).eval()


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("lora", [{}, {"use_dora": True}, {"use_rslora": True}], ids=str)
def test_the_tuned_weight_is_what_the_layer_multiplies_by(tiny_base, tmp_path, lora, quantization) -> None:
    layer = layer_called(live(tiny_base, tmp_path, lora, quantization=quantization), VALUE)
    assert is_folded(layer)
    x = torch.randn(5, layer.in_features)
    start = held(layer)
    with torch.no_grad():
        expected = layer(x)
        torch.testing.assert_close(x @ tuned(layer, start).T, expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(tuned(layer, start), start)


def test_the_noise_is_more_than_another_order_of_sums_makes(tiny_base, tmp_path) -> None:
    layer = layer_called(live(tiny_base, tmp_path), VALUE)
    a, b = (part["default"].weight.detach() for part in (layer.lora_A, layer.lora_B))
    start = held(layer)
    backwards = start + layer.scaling["default"] * (b.flip(1) @ a.flip(0))
    off = (backwards - tuned(layer, start)).abs()
    assert (off <= noise(layer, start)).all()
    assert noise(layer, start).max() < 1e-5


def test_a_layer_without_an_adapter_is_what_it_holds(tiny_base, tmp_path) -> None:
    model = live(tiny_base, tmp_path, {"target_modules": ["q_proj"]}, quantization="none")
    layer = layer_called(model, VALUE)
    assert not is_folded(layer)
    assert tuned(layer, held(layer)).equal(layer.weight)
    assert noise(layer, held(layer)) is None


def test_what_was_trained_whole_stands_in_its_place_and_what_is_not_there_is_none(tiny_base, tmp_path) -> None:
    model = live(tiny_base, tmp_path, {"modules_to_save": ["lm_head"]})
    head = layer_called(model, "lm_head")
    assert head is model.get_base_model().lm_head.modules_to_save["default"]
    assert layer_called(model, "model.layers.9.self_attn.v_proj") is None
