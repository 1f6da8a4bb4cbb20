"""A memory technique is one file: [memory], the plan, the live model and its bytes then have it."""

import json
from pathlib import Path

import pytest
from adding import Run, qtune_with, verbs
from stopped_runs import told, write_recipe

from qtune.events import Rehearsed

NORM_BYTES = 2 * 2 * 512  # two layers, two norms of 64 in float32 each, in whole blocks of the allocator


@pytest.fixture
def with_norms(tmp_path: Path) -> Run:
    return qtune_with(Path(__file__).with_name("host_norms.py"), "memory/techniques", tmp_path)


def test_a_technique_from_one_file_is_planned_and_switched_on(with_norms: Run, tiny_base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_base, memory={"norms": "host"})
    one_step = f"run {recipe} --set train.max_steps=1 --set evaluate.rows=0 --output {tmp_path}/run"
    (_, schema), (_, words), (_, without), (_, in_json), (code, _) = verbs(
        with_norms,
        "schema",
        f"plan {recipe}",
        f'plan {recipe} --json --set memory.norms="auto"',
        f"plan {recipe} --json",
        one_step,
    )
    assert json.loads(schema)["$defs"]["Memory"]["properties"]["norms"]["enum"] == ["auto", "device", "host"]
    assert "● norms in host memory" in words
    off, on = json.loads(without), json.loads(in_json)
    assert [rung["is_on"] for plan in (off, on) for rung in plan["rungs"] if rung["setting"] == "norms"] == [
        False,
        True,
    ]
    assert (off["techniques"]["host_norms"], on["techniques"]["host_norms"]) == (False, True)
    assert on["forecast"]["host"]["norms"] == NORM_BYTES
    assert off["forecast"]["device"]["base"] - on["forecast"]["device"]["base"] == NORM_BYTES
    assert code == 0
    (rehearsed,) = told(tmp_path / "run", Rehearsed)
    assert rehearsed.measured_bytes == pytest.approx(rehearsed.forecast_bytes, rel=0.005)


def test_an_older_run_is_read_by_a_qtune_that_has_one_technique_more(
    with_norms: Run, finished: Path, tmp_path: Path
) -> None:
    (code, _) = verbs(with_norms, f"eval {finished} --json")[0]
    assert code == 0
