"""Bases whose files hold codes: trained, gone on with, and merged into plain files of 16 bits."""

from pathlib import Path

import pytest
import torch
from made_codes import make
from made_towers import tensors
from stopped_runs import assert_same, copy, qtune, write_recipe
from transformers import AutoModelForCausalLM

from qtune.model.open_model import open_run
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
