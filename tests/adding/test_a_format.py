"""A data format is one file: it is recognised by its columns, checked, trained on, and listed among the settings."""

import json
from pathlib import Path

import pytest
from adding import Run, qtune_with, verbs
from stopped_runs import write_recipe


@pytest.fixture
def with_dialogue(tmp_path: Path) -> Run:
    return qtune_with(Path(__file__).with_name("dialogue.py"), "data/formats", tmp_path)


def test_a_format_from_one_file_is_recognised_and_trained_on(
    with_dialogue: Run, tiny_base: Path, tmp_path: Path
) -> None:
    rows = [{"dialogue": f"Q: What is {n}? A: It is {n * 7}.", "id": n} for n in range(20)]
    recipe = write_recipe(tmp_path, tiny_base, evaluate={"metric": "none", "general": "none"}, train={"max_steps": 1})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (_, schema), (good, _), (trained, _) = verbs(
        with_dialogue, "schema", f"data check {recipe} --json", f"run {recipe} --output {tmp_path / 'run'}"
    )
    assert json.loads(schema)["$defs"]["Data"]["properties"]["format"]["enum"][-1] == "dialogue"
    assert (good, trained) == (0, 0)
    told = json.loads((tmp_path / "run" / "data.json").read_text())
    assert (told["format"], told["rows_read"]) == ("dialogue", 20)
    assert [(each["field"], each["rows"]) for each in told["unused"]] == [("id", 20)]
    trained_text = "".join(text for text, is_trained in told["sample"] if is_trained)
    assert trained_text.startswith("It is ")


def test_its_bad_rows_are_told_by_their_kind(with_dialogue: Run, tiny_base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_base)
    (tmp_path / "rows.jsonl").write_text('{"dialogue": "Q: What? A: That."}\n{"dialogue": "Q: And?"}\n')
    ((code, checked),) = verbs(with_dialogue, f"data check {recipe} --json")
    assert code == 2
    (finding,) = [each for each in json.loads(checked)["findings"] if each["code"] == "missing-answer"]
    assert finding["places"] == [{"place": "rows.jsonl:2", "told": "the dialogue breaks off"}]
