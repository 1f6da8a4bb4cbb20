"""A metric is one file: the settings, the commands, the check of the data, the scores and their tables then have it."""

import json
from pathlib import Path

import pytest
from adding import Run, qtune_with, verbs
from stopped_runs import copy, write_recipe


@pytest.fixture
def with_shouting(tmp_path: Path) -> Run:
    return qtune_with(Path(__file__).with_name("shouting.py"), "evaluate/metrics", tmp_path)


def test_a_metric_from_one_file_scores_a_run(with_shouting: Run, finished: Path, tmp_path: Path) -> None:
    rows = [{"question": "How loud?", "answer": answer} for answer in ("LOUD", "VERY Loud", "A")]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = copy(finished, tmp_path / "run")
    asked = f"eval {run} --data {tmp_path}/mine.jsonl --metric shouting"
    (_, schema), (_, in_json), (_, in_words) = verbs(with_shouting, "schema", f"{asked} --json", asked)
    metric = json.loads(schema)["$defs"]["Evaluate"]["properties"]["metric"]
    assert metric["enum"][-1] == "shouting"
    assert metric["description"].endswith("tool_calls for rows that call tools, shouting for capitals.")
    scores = json.loads(in_json)
    assert (scores["metric"], scores["rows"], set(scores["tuned"]["parts"])) == ("shouting", 3, {"heard"})
    assert "loudness on 3 rows" in in_words


def test_rows_that_it_cannot_score_are_refused(with_shouting: Run, tiny_base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_base, evaluate={"metric": "shouting"})
    (code, checked), refused = verbs(with_shouting, f"data check {recipe} --json", f"check {recipe} --no-plan")
    assert code == 2
    assert "its reference whispers" in checked
    assert 'cannot be scored by evaluate.metric = \\"shouting\\"' in checked
    assert refused == (2, "")
