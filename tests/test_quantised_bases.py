"""Bases whose files hold codes: trained, gone on with, and merged into plain files of 16 bits."""

from pathlib import Path

import pytest
import torch
from made_codes import make, make_4_bits
from made_towers import tensors
from safetensors.torch import save_file
from stopped_runs import assert_same, copy, qtune, write_recipe
from transformers import AutoModelForCausalLM

from qtune.errors import ModelError
from qtune.model.base import load_base, read_config_alone
from qtune.model.open_model import open_run
from qtune.recipe.schema import Model
from qtune.rundir import RunDir, read_json

TRAIN = {"max_steps": 2, "learning_rate": 1e-2}
UNSCORED = {"metric": "none", "general": "none"}


@pytest.mark.parametrize("kind", ["fp8", pytest.param("mxfp4", marks=pytest.mark.long)])
def test_from_data_to_merge(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run, half of it again, and its merge: whole runs, of two seconds each."""
    base, run, again, merged = (tmp_path / name for name in ("base", "run", "again", "merged"))
    meant = make(kind, base)
    model = {"base": str(base), "compute_dtype": "bfloat16" if kind == "mxfp4" else "float32"}
    recipe = write_recipe(tmp_path, base, model=model, train=TRAIN, evaluate=UNSCORED, save={"every": 1})
    assert qtune("run", recipe, "--output", run) == 0
    copy(run, again, up_to=1)
    assert qtune("resume", again) == 0
    assert_same(run, again)

    assert qtune("merge", run, "--output", merged) == 0
    assert "in codes are written in 16 bits" in " ".join(capsys.readouterr().out.split())
    written = tensors(merged)
    assert {name: (each.dtype, each.shape) for name, each in written.items()} == {
        name: (torch.bfloat16, each.shape) for name, each in meant.items()
    }
    assert "quantization_config" not in read_json(merged / "config.json")
    plain = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    tuned, ids = open_run(RunDir.open(run)), torch.arange(10, 40)[None]
    with torch.no_grad():
        expected = tuned.model(input_ids=ids, use_cache=False).logits
        assert (plain(input_ids=ids, use_cache=False).logits - expected).abs().max() < 0.05 * expected.std()


@pytest.mark.parametrize(
    ("kind", "is_double", "dtype"),
    [("nf4", True, "bfloat16"), pytest.param("fp4", False, "float32", marks=pytest.mark.long)],
)
def test_files_in_4_bits_are_used_as_they_are(
    kind: str, is_double: bool, dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, run, again, merged = (tmp_path / name for name in ("base", "run", "again", "merged"))
    make_4_bits(base, kind, is_double)
    stored = tensors(base)
    model = {"base": str(base), "compute_dtype": dtype}
    recipe = write_recipe(tmp_path, base, model=model, train=TRAIN, evaluate=UNSCORED, save={"every": 1})
    assert qtune("run", recipe, "--output", run) == 0
    copy(run, again, up_to=1)
    assert qtune("resume", again) == 0
    assert_same(run, again)
    locked = read_json(run / "lock.json")["quantization"]
    assert locked == {"type": kind, "double": is_double, "blocksize": 64, "quant_storage": "uint8", "is_given": True}

    tuned = open_run(RunDir.open(run))
    weight = tuned.without_peft.get_submodule("model.layers.0.mlp.up_proj").weight
    assert torch.equal(weight.data, stored["model.layers.0.mlp.up_proj.weight"])
    assert qtune("merge", run, "--output", merged, "--onto", "original") == 2
    assert "the original weights that these were made from are missing" in " ".join(capsys.readouterr().err.split())
    assert qtune("merge", run, "--output", merged) == 0
    assert "quantization_config" not in read_json(merged / "config.json")
    written = tensors(merged)
    assert not [name for name in written if "absmax" in name or "quant_state" in name]
    assert {each.dtype for each in written.values()} == {torch.bfloat16}
    plain, ids = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32), torch.arange(10, 40)[None]
    with torch.no_grad():
        expected = tuned.model(input_ids=ids, use_cache=False).logits.float()
        assert (plain(input_ids=ids, use_cache=False).logits - expected).abs().max() < 0.1 * expected.std()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quantization": "none"}, 'model.quantization = "none": the weights of'),
        ({"double_quantization": False}, "model.double_quantization = false: the scales of"),
    ],
)
def test_settings_that_files_in_4_bits_cannot_have(settings: dict, words: str, tmp_path: Path) -> None:
    model = Model(base=str(make_4_bits(tmp_path)), **settings)
    with pytest.raises(ModelError, match=words):
        read_config_alone(model)


def test_4_bits_that_are_not_there_are_named(tmp_path: Path) -> None:
    stored = tensors(make_4_bits(tmp_path))
    gone = "model.layers.1.mlp.up_proj.weight"
    save_file({n: t for n, t in stored.items() if not n.startswith(gone)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"lack model\.layers\.1\.mlp\.up_proj\.weight"):
        load_base(Model(base=str(tmp_path)), "cpu", "float32")
