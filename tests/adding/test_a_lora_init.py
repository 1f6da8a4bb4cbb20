"""What an adapter may begin from is one file: [lora] init then has it, and a run begins so."""

import json
from pathlib import Path

import pytest
from adding import Run, qtune_with, verbs
from safetensors.torch import load_file
from stopped_runs import write_recipe


@pytest.fixture
def with_hushed(tmp_path: Path) -> Run:
    return qtune_with(Path(__file__).with_name("hushed.py"), "model/lora_inits", tmp_path)


def test_a_beginning_from_one_file_is_trained_from(with_hushed: Run, tiny_base: Path, tmp_path: Path) -> None:
    recipe, run = write_recipe(tmp_path, tiny_base, lora={"init": "hushed", "rank": 8}), tmp_path / "run"
    (_, schema), (code, told) = verbs(
        with_hushed, "schema", f"run {recipe} --set train.max_steps=1 --set train.learning_rate=1e-9 --output {run}"
    )
    assert "hushed" in json.loads(schema)["$defs"]["Lora"]["properties"]["init"]["enum"]
    assert code == 0, told
    saved = load_file(run / "adapter" / "adapter_model.safetensors")
    longest = max(float(tensor.abs().max()) for name, tensor in saved.items() if "lora_A" in name)
    assert longest < 0.01  # 1 / sqrt(64) is what peft draws up to
