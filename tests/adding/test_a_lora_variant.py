"""A variant of LoRA is one file: [lora], the plan, the adapter and its merge then have it."""

import json
from pathlib import Path

import pytest
from adding import Run, qtune_with, verbs
from stopped_runs import write_recipe


@pytest.fixture
def with_calm(tmp_path: Path) -> Run:
    return qtune_with(Path(__file__).with_name("calm.py"), "model/lora_variants", tmp_path)


def test_a_variant_from_one_file_is_trained_and_merged(with_calm: Run, tiny_base: Path, tmp_path: Path) -> None:
    lora = {"calm": True, "rank": 8, "alpha": 32, "dropout": 0}
    recipe, run = write_recipe(tmp_path, tiny_base, lora=lora), tmp_path / "run"
    (_, schema), (_, planned), (code, _), (merged, told) = verbs(
        with_calm,
        "schema",
        f"plan {recipe} --json",
        f"run {recipe} --set train.max_steps=2 --output {run}",
        f"merge {run} --output {tmp_path}/merged",
    )
    assert json.loads(schema)["$defs"]["Lora"]["properties"]["calm"]["default"] is False
    adapter = next(choice for choice in json.loads(planned)["choices"] if choice["name"] == "adapter")
    assert adapter["value"].startswith("calm LoRA, rank 8, scale 8, ")  # 32 / 8^(2/3)
    assert code == 0
    saved = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert saved["lora_alpha"] / saved["r"] == pytest.approx(8)
    assert merged == 0, told  # what merges is held against the live adapter
