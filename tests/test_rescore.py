"""A finished run scored again: the same scores as after training, a merged model in its place, and lm-eval for real."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from stopped_runs import copy, qtune, write_recipe

from qtune.evaluate.benchmarks import Result, results_of
from qtune.rundir import read_json

SCORED = {"metric": "token_f1", "rows": 3, "max_new_tokens": 4, "samples": 2, "general": "none"}


def asked(capsys: pytest.CaptureFixture, *arguments: str | Path) -> dict[str, Any]:
    capsys.readouterr()
    assert qtune("eval", *arguments, "--json") == 0
    return dict(json.loads(capsys.readouterr().out))


def test_the_scores_are_those_of_the_run_on_as_many_rows_as_wanted(finished: Path, tmp_path: Path, capsys) -> None:
    run = copy(finished, tmp_path / "run")
    scores = read_json(run / "scores.json")
    again = asked(capsys, run, "--rows", "3", "--samples", "1")
    for who in ("base", "tuned"):
        assert again[who]["held_out_loss"] == pytest.approx(scores[who]["held_out_loss"], abs=1e-3)
        assert again[f"{who}_scores"] == scores[f"{who}_scores"]
    assert again["base"]["held_out_loss"] != again["tuned"]["held_out_loss"]
    assert len(again["samples"]) == 1
    assert read_json(run / "eval-rows.json") == again
    assert qtune("eval", run) == 0
    assert "shared words on 5 rows" in capsys.readouterr().out


def test_merged_models_are_asked_the_same_beside_the_run_they_came_from(finished: Path, tmp_path: Path, capsys) -> None:
    run, merged, nothing = copy(finished, tmp_path / "run"), tmp_path / "merged", tmp_path / "nothing"
    assert qtune("merge", run, "--output", merged, "--onto", "dequantised") == 0
    found = asked(capsys, run, "--merged", merged)
    assert found[str(merged)]["held_out_loss"] == pytest.approx(found["tuned"]["held_out_loss"], abs=5e-3)
    assert found["same_answers"][str(merged)] >= 4  # of 5: in bfloat16 a tie may fall to the other side
    assert all(sample[str(merged)] for sample in found["samples"])
    assert qtune("eval", run, "--merged", merged, "--samples", "1") == 0
    assert "answers as tuned" in capsys.readouterr().out
    assert qtune("eval", run, "--merged", nothing, "--merged", merged) == 2
    assert capsys.readouterr().err.strip() == f"--merged {nothing}: there is no such folder or file."


def test_a_gguf_file_is_asked_the_same_by_llama_cpp(finished: Path, tmp_path: Path, capsys) -> None:
    pytest.importorskip("llama_cpp", reason="the extra `verify` is not installed")
    (tmp_path / "prose.txt").write_text("a plain text\nof two lines\n")
    scored = {**SCORED, "general": "prose.txt"}
    recipe = write_recipe(tmp_path, Path("demo"), evaluate=scored, train={"max_steps": 2}, memory={"rehearse": False})
    run, file = tmp_path / "run", tmp_path / "out" / "model.gguf"
    assert qtune("run", recipe, "--output", run) == 0
    assert qtune("export", run, "--quant", "f16", "--output", file.parent) == 0
    found = asked(capsys, run, "--merged", file)
    for loss in ("held_out_loss", "general_loss"):
        assert found[str(file)][loss] == pytest.approx(found["tuned"][loss], abs=2e-2)
    assert found["same_answers"][str(file)] >= 4
    other = tmp_path / "other.gguf"
    other.write_bytes(b"GGUF and nothing else")
    assert qtune("eval", run, "--merged", other) == 2
    assert f"{other}: does not load in llama.cpp" in capsys.readouterr().err


def test_rows_that_changed_since_are_refused(finished: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(finished.parent, tmp_path / "place")
    run, rows = tmp_path / "place" / "run", finished.parent / "rows.jsonl"
    before = rows.read_text()
    try:
        rows.write_text(before.replace("it is 3", "it is 4"))
        assert qtune("eval", run) == 2
    finally:
        rows.write_text(before)
    assert f"does not give the rows of {run} any more" in capsys.readouterr().err


def test_rows_of_ones_own_are_scored_and_those_trained_on_are_named(finished: Path, tmp_path: Path, capsys) -> None:
    """The file has other columns than the recipe's rows, and all of those beside new ones."""
    run, mine = copy(finished, tmp_path / "run"), tmp_path / "mine.jsonl"
    known = [json.loads(line) for line in (finished.parent / "rows.jsonl").read_text().splitlines()]
    rows = [{"prompt": f"what is {'y' * i}?", "completion": f"it is {i}"} for i in range(1, 5)]
    rows += [{"prompt": row["question"], "completion": row["answer"]} for row in known]
    mine.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert qtune("eval", run, "--rows", "3") == 0
    of_held_out = (run / "eval-rows.json").read_bytes()
    found = asked(capsys, run, "--data", mine, "--metric", "exact_match", "--samples", "1")
    assert (found["format"], found["metric"], found["rows"]) == ("prompt-completion", "exact_match", len(rows))
    held_out = read_json(run / "data.json")["held_out_rows"]
    assert len(found["trained_on"]) == len(known) - held_out
    assert set(found["trained_on"]) <= {f"mine.jsonl:{line}" for line in range(5, len(rows) + 1)}
    assert found["base"]["held_out_loss"] > found["tuned"]["held_out_loss"]
    assert found["difference"]["low"] <= found["difference"]["score"] <= found["difference"]["high"]
    assert len(found["samples"]) == 1
    assert read_json(run / "eval-data-mine-exact_match.json") == found
    assert (run / "eval-rows.json").read_bytes() == of_held_out
    assert qtune("eval", run, "--data", mine, "--rows", "2") == 0
    said = "".join(capsys.readouterr().out.split())  # long paths are folded, and in the middle of a word
    assert f"mine.jsonl:{len(rows)}rows,readasprompt-completion" in said
    assert f"{len(known) - held_out}rowsofthesehadbeentrainedon(mine.jsonl:" in said
    assert "held-outloss" not in said
    first = asked(capsys, run, "--data", mine, "--rows", "2")  # the loss was over all rows, however many there were
    mine.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    assert first["base"]["held_out_loss"] == asked(capsys, run, "--data", mine)["base"]["held_out_loss"]


def test_rows_of_ones_own_that_cannot_be_scored_are_named_by_line(finished: Path, tmp_path: Path, capsys) -> None:
    run, mine = copy(finished, tmp_path / "run"), tmp_path / "mine.jsonl"
    mine.write_text('{"question": "a?", "answer": "b"}\n{"question": "a?", "answer": null}\n')
    assert qtune("eval", run, "--data", mine) == 2
    assert "mine.jsonl:2: the answer is null" in capsys.readouterr().err
    mine.write_text('{"question": "a?", "answer": "b"}\n')
    assert qtune("eval", run, "--data", mine, "--metric", "policy") == 2
    assert "mine.jsonl:1" in capsys.readouterr().err
    assert qtune("eval", run, "--data", tmp_path / "none.jsonl") == 2
    assert "none.jsonl: there is no such file" in capsys.readouterr().err
    assert qtune("eval", run, "--metric", "f1") == 2
    assert "must be one of exact_match, token_f1" in capsys.readouterr().err


def test_rows_of_ones_own_are_asked_by_the_template_that_the_run_kept(finished: Path, tmp_path: Path, capsys) -> None:
    """They were asked by what the recipe's file said by then."""
    run, mine = copy(finished, tmp_path / "run"), tmp_path / "mine.jsonl"
    mine.write_text('{"question": "q", "answer": "a"}\n')
    (run / "adapter" / "chat_template.jinja").write_text("{{ 1 / 0 }}")
    assert qtune("eval", run, "--data", mine) == 2
    assert "division by zero" in capsys.readouterr().err


def test_what_has_no_effect_is_refused(finished: Path, capsys) -> None:
    for arguments, named in (
        (["--limit", "3"], "--limit: has no effect without --tasks"),
        (["--tasks", "x", "--rows", "3"], "--rows: has no effect beside --tasks"),
        (["--tasks", ","], "--tasks: names no task"),
        (["--tasks", "x", "--merged", "folder", "x.gguf"], "--merged x.gguf: lm-eval is run on models that"),
    ):
        assert qtune("eval", finished, *arguments) == 2
        assert named in capsys.readouterr().err


def test_a_run_without_held_out_rows_says_so(tiny_base: Path, tmp_path: Path, capsys) -> None:
    recipe = write_recipe(tmp_path, tiny_base, data={"held_out_fraction": 0}, train={"max_steps": 1}, evaluate=SCORED)
    assert qtune("run", recipe, "--output", tmp_path / "run") == 0
    assert qtune("eval", tmp_path / "run") == 2
    assert "kept no held-out rows to score on" in capsys.readouterr().err


def test_without_lm_eval_the_extra_is_named(finished: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qtune.evaluate.benchmarks.find_spec", lambda name: None)
    assert qtune("eval", finished, "--tasks", "arc_easy") == 2
    told = capsys.readouterr()
    assert told.err.startswith("--tasks: needs lm-eval, which is not installed: pip install '.[eval]'")
    assert told.out == ""  # it said that it was getting the data first


def test_the_figures_of_lm_eval_are_read_with_their_errors() -> None:
    found = {
        "arc": {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": 0.1, "em,strict": 1, "em_stderr,strict": "N/A"}
    }
    assert results_of(found) == [Result("arc", "acc", 0.5, 0.1), Result("arc", "em (strict)", 1.0, None)]


@pytest.fixture
def own_task(tmp_path: Path) -> Path:
    """A folder with a task of lm-eval, whose data are beside it."""
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    rows = [{"q": f"what is {'x' * (i % 9)}?", "choices": [f" it is {i}", f" is {i} it"], "gold": 0} for i in range(20)]
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks" / "own.yaml").write_text(
        f"task: own_rows\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/tasks/rows.jsonl\n"
        'test_split: test\noutput_type: multiple_choice\ndoc_to_text: "{{q}}"\ndoc_to_choice: "{{choices}}"\n'
        "doc_to_target: gold\nmetric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    return tmp_path / "tasks"


def test_lm_eval_asks_base_and_tuned(finished: Path, own_task: Path, tmp_path: Path, capsys) -> None:
    run = copy(finished, tmp_path / "run")
    found = asked(capsys, run, "--tasks", "own_rows", "--task-folder", own_task)
    ((base,), (tuned,)) = found["results"]["base"], found["results"]["tuned"]
    assert (base["task"], base["metric"]) == ("own_rows", "acc")
    assert tuned["value"] > base["value"]  # it was trained on the likes of the right answers
    assert read_json(run / "eval-tasks.json") == found
    assert qtune("eval", run, "--tasks", "own_rows", "--task-folder", own_task, "--limit", "4") == 0
    assert "4 rows of each task at the most" in capsys.readouterr().out


def test_lm_eval_asks_a_merged_model(finished: Path, own_task: Path, tmp_path: Path, capsys) -> None:
    run = copy(finished, tmp_path / "run")
    assert qtune("merge", run, "--output", tmp_path / "merged", "--onto", "dequantised") == 0
    merged = tmp_path / "merged"
    found = asked(capsys, run, "--tasks", "own_rows", "--task-folder", own_task, "--merged", merged)["results"]
    ((tuned,), (folded,)) = found["tuned"], found[str(merged)]
    assert folded["value"] == pytest.approx(tuned["value"], abs=0.1)  # rounding tips a row


def test_a_task_that_is_unknown_or_has_no_data_is_one_sentence(finished: Path, own_task: Path, capsys) -> None:
    assert qtune("eval", finished, "--tasks", "own_row", "--task-folder", own_task) == 2
    assert "lm-eval has no task own_row. Did you mean own_rows?" in capsys.readouterr().err
    (own_task / "rows.jsonl").unlink()
    assert qtune("eval", finished, "--tasks", "own_rows", "--task-folder", own_task) == 2
    said = capsys.readouterr().err
    assert "--tasks: the data of own_rows cannot be had" in said
    assert "Traceback" not in said
    assert qtune("eval", finished, "--tasks", "own_rows", "--task-folder", own_task / "nowhere") == 2
    assert "--task-folder: there is no folder" in capsys.readouterr().err
