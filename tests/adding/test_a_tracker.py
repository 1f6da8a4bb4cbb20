"""A tracker is one file: the settings know its name, and a run tells it what it tells all of them."""

import json
from pathlib import Path

from adding import qtune_with, verbs
from stopped_runs import write_recipe

from qtune.events import Evaluated, StepDone
from qtune.rundir import RunDir


def test_a_tracker_from_one_file_is_told_of_a_run(tiny_base: Path, tmp_path: Path) -> None:
    with_diary = qtune_with(Path(__file__).with_name("diary.py"), "train/trackers", tmp_path)
    recipe = write_recipe(tmp_path, tiny_base, train={"max_steps": 3, "eval_every": 2})
    (_, schema), (code, _) = verbs(with_diary, "schema", f"run {recipe} --output {tmp_path}/told --set report.to=diary")
    assert json.loads(schema)["$defs"]["Report"]["properties"]["to"]["enum"][-1] == "diary"
    assert code == 0
    events = list(RunDir(tmp_path / "told").events())
    first, *told, last = (tmp_path / "diary.txt").read_text().splitlines()
    assert (first, last) == ("dear diary", "good night")
    steps = [f"{event.step} loss {event.loss}" for event in events if isinstance(event, StepDone)]
    held_out = [f"{event.step} eval_loss {event.loss}" for event in events if isinstance(event, Evaluated)]
    assert sorted(told) == sorted(steps + held_out)
    assert len(steps) == 3
