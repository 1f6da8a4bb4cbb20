"""An optimizer is one file: the settings, the plan's bytes, the trainer and the checkpoints then have it."""

import json
from pathlib import Path

import pytest
from adding import Run, qtune_with, verbs
from safetensors.torch import load_file
from stopped_runs import assert_same, copy, write_recipe


@pytest.fixture
def with_momentum(tmp_path: Path) -> Run:
    return qtune_with(Path(__file__).with_name("momentum.py"), "train/optimizers", tmp_path)


def test_an_optimizer_from_one_file_runs_and_resumes(with_momentum: Run, tiny_base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_base, train={"optimizer": "momentum"}, save={"every": 2, "keep": 9})
    alone, stopped = tmp_path / "alone", tmp_path / "stopped"
    (_, schema), (_, planned), (code, _) = verbs(
        with_momentum, "schema", f"plan {recipe} --json", f"run {recipe} --output {alone}"
    )
    assert code == 0
    assert json.loads(schema)["$defs"]["Train"]["properties"]["optimizer"]["enum"][-1] == "momentum"
    copy(alone, stopped, up_to=4)
    (path,) = (stopped / "checkpoints").glob("step-*4/optimizer.safetensors")
    state = load_file(path)
    assert {name.rsplit(":", 1)[-1] for name in state} == {"momentum_buffer"}
    blocks = sum(-(-tensor.nbytes // 512) * 512 for tensor in state.values())
    assert json.loads(planned)["forecast"]["device"]["optimizer"] == blocks
    assert verbs(with_momentum, f"resume {stopped}")[0][0] == 0
    assert_same(alone, stopped)
