"""A base's tensors as they are read: codes as what they stand for, to the bit, and one at a time."""

import json
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from made_codes import make
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from qtune.errors import ModelError
from qtune.model import checkpoint
from qtune.model.base import load_base
from qtune.model.checkpoint import BaseCheckpoint
from qtune.recipe.schema import Model

KINDS = ("fp8", "fp8 whole", "mxfp4")


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_read_as_what_they_mean(kind: str, tmp_path: Path) -> None:
    meant = make(kind, tmp_path)
    opened = BaseCheckpoint.open(tmp_path)
    assert opened.specs().keys() == meant.keys()
    for name, spec in opened.specs().items():
        tensor = opened.called(name)
        assert (spec.dtype, spec.shape) == (tensor.dtype, tuple(tensor.shape)) == (torch.bfloat16, meant[name].shape)
        assert torch.equal(tensor, meant[name])


def test_they_mean_what_transformers_says(tmp_path: Path) -> None:
    make("mxfp4", tmp_path / "mxfp4")
    make("fp8", tmp_path / "fp8")
    stored = load_file(tmp_path / "mxfp4/model.safetensors")
    for name in (each.removesuffix("_blocks") for each in stored if each.endswith("_blocks")):
        theirs = convert_moe_packed_tensors(stored[f"{name}_blocks"], stored[f"{name}_scales"])
        assert torch.equal(BaseCheckpoint.open(tmp_path / "mxfp4").called(name), theirs)
    stored = load_file(tmp_path / "fp8/model.safetensors")
    name = "model.layers.0.self_attn.k_proj.weight"
    theirs = Fp8Dequantize(SimpleNamespace())._dequantize_one(stored[name], stored[f"{name}_scale_inv"], torch.bfloat16)
    assert torch.equal(BaseCheckpoint.open(tmp_path / "fp8").called(name), theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_is_what_16_bit_files_give(kind: str, tmp_path: Path) -> None:
    """In NF4, where its linears are: the same codes and scales as of a checkpoint in bfloat16."""
    meant = make(kind, tmp_path / "codes")
    make(kind, tmp_path / "plain")
    save_file(meant, tmp_path / "plain/model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "plain/config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "plain/config.json").write_text(json.dumps(config))
    ours, plain = (load_base(Model(base=str(tmp_path / each)), "cpu", "float32") for each in ("codes", "plain"))
    expected = dict(plain.named_parameters())
    assert any(parameter.dtype == torch.uint8 for parameter in expected.values())
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, expected[name]), name


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        ("k_proj.weight_scale_inv", r"model\.safetensors: model\.layers\.0\.self_attn\.k_proj\.weight is in fp8, and"),
        ("proj.weight", r"config\.json: quantization_config says fp8, and no tensor in the files is"),
    ],
)
def test_half_of_it_is_refused(lost: str, words: str, tmp_path: Path) -> None:
    make("fp8", tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    save_file({n: t for n, t in stored.items() if not n.endswith(lost)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=words):
        load_base(Model(base=str(tmp_path)), "cpu", "float32")


def test_scales_of_another_shape_are_refused(tmp_path: Path) -> None:
    make("fp8", tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight_scale_inv"
    save_file({**stored, name: stored[name][:2].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"up_proj\.weight_scale_inv has the shape \[2, 2\], which does not scale"):
        BaseCheckpoint.open(tmp_path)


def test_one_tensor_at_a_time_is_in_16_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the base is brought to NF4: what was restored is gone before the next is."""
    meant = make("fp8", tmp_path)
    alive: dict[int, int] = {}
    most = 0
    restored = checkpoint.Packed.restored

    def counted(self: checkpoint.Packed, opened: Any) -> torch.Tensor:
        nonlocal most
        tensor = restored(self, opened)
        alive[id(tensor)] = tensor.nbytes
        weakref.finalize(tensor, alive.pop, id(tensor))
        most = max(most, sum(alive.values()))
        return tensor

    monkeypatch.setattr(checkpoint.Packed, "restored", counted)
    load_base(Model(base=str(tmp_path)), "cpu", "bfloat16")
    packed = [meant[name].nbytes for name in BaseCheckpoint.open(tmp_path).packed]
    assert most == max(packed) < sum(packed) / 3
