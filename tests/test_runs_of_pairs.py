"""Runs that learn from pairs, from rows to report: what they tell, that they go on exactly, alone and as two."""

import json
from pathlib import Path
from typing import Any

import pytest
from made_ranks import Launch
from stopped_runs import assert_same, copy, qtune, told, write_recipe

from qtune.events import Evaluated, Rehearsed, Scored, StepDone
from qtune.rundir import read_json

LN_2 = 0.6931
ROWS = 24
TRAIN = {"epochs": 2, "gradient_accumulation": 3, "learning_rate": 1e-2, "eval_every": 3}
LORA = {"rank": 16, "alpha": 32, "dropout": 0.1, "targets": "all-linear"}
SETTINGS: dict[str, Any] = {
    "lora": LORA,
    "data": {"max_tokens": 160, "packing": True},
    "evaluate": {"metric": "token_f1", "rows": 2, "max_new_tokens": 3, "general": "none"},
    "save": {"every": 1, "keep": 100},
}


def recipe(folder: Path, base: Path, objective: str, **changes: dict[str, Any]) -> Path:
    settings = {**SETTINGS, "train": {**TRAIN, "objective": objective}, **changes}
    path = write_recipe(folder, base, **settings)
    pairs = [
        {"prompt": f"what is {'x' * (i % 9)}?", "chosen": f"it is {i}", "rejected": f"no, {i} it is not"}
        for i in range(ROWS)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return path


@pytest.fixture(scope="module", params=["dpo", "orpo"])
def run(request: pytest.FixtureRequest, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    assert qtune("run", recipe(folder, tiny_base, request.param), "--output", folder / "run") == 0
    return folder / "run"


def test_it_learns_the_preference_and_says_so(run: Path) -> None:
    scores, losses = read_json(run / "scores.json"), [event.loss for event in told(run, StepDone)]
    base, tuned = scores["base"], scores["tuned"]
    assert losses[-1] < losses[0]
    assert tuned["held_out_loss"] < base["held_out_loss"]
    assert tuned["preferred"]["margin"] > base["preferred"]["margin"]
    assert tuned["preferred"]["score"] == 1.0
    assert [event.preferred for event in told(run, Scored)] == [base["preferred"]["score"], 1.0]
    if run.parent.name.startswith("dpo"):
        assert losses[0] == pytest.approx(LN_2, abs=1e-2)
        assert base["held_out_loss"] == pytest.approx(LN_2, abs=1e-4)
    summary = (run / "summary.md").read_text()
    assert "the chosen answer is the likelier one in 100.0 % of held-out pairs" in summary
    assert "chosen answer preferred" in summary


def test_the_last_held_out_loss_is_that_of_the_score(run: Path) -> None:
    assert told(run, Evaluated)[-1].loss == pytest.approx(read_json(run / "scores.json")["tuned"]["held_out_loss"])


def test_the_forecast_is_that_of_the_rehearsal(run: Path) -> None:
    [rehearsed] = told(run, Rehearsed)
    assert rehearsed.measured_bytes == pytest.approx(rehearsed.forecast_bytes, rel=0.01)


def test_it_goes_on_exactly(run: Path, tmp_path: Path) -> None:
    """With dropout; the base's pass draws no random number, and the base's score is read again."""
    again = copy(run, tmp_path / "run", up_to=2)
    assert qtune("resume", again) == 0
    assert_same(again, run)


def test_it_is_scored_again_and_merged_models_beside_it(run: Path, tmp_path: Path, capsys: Any) -> None:
    merged = tmp_path / "merged"
    assert qtune("merge", run, "--output", merged, "--onto", "dequantised") == 0
    capsys.readouterr()
    assert qtune("eval", run, "--merged", merged, "--json") == 0
    found, before = json.loads(capsys.readouterr().out), read_json(run / "scores.json")
    for name, as_before in (("base", "base"), ("tuned", "tuned"), (str(merged), "tuned")):
        assert found[name]["held_out_loss"] == pytest.approx(before[as_before]["held_out_loss"], abs=1e-2)
        assert found[name]["preferred"]["margin"] == pytest.approx(before[as_before]["preferred"]["margin"], abs=0.1)
    assert qtune("eval", run) == 0
    assert "its margin, nats a token" in capsys.readouterr().out


def test_pairs_of_ones_own_are_scored(run: Path, tmp_path: Path, capsys: Any) -> None:
    own = tmp_path / "own.jsonl"
    pairs = [{"prompt": "what is x?", "chosen": f"it is {i}", "rejected": "no"} for i in range(3)]
    own.write_text("\n".join(map(json.dumps, pairs)))
    assert qtune("eval", run, "--data", own, "--json") == 0
    assert json.loads(capsys.readouterr().out)["tuned"]["preferred"]["score"] >= 0
    own.write_text(json.dumps({"prompt": "q", "completion": "a"}))
    assert qtune("eval", run, "--data", own) == 2
    assert "hold no pairs" in capsys.readouterr().err


def test_steps_are_means_over_pairs_whatever_passes_they_are_in(tiny_base: Path, tmp_path: Path) -> None:
    """Packs of unlike many pairs, and batches that go in pieces."""
    exact = {"model": {"base": str(tiny_base), "quantization": "none", "compute_dtype": "float32"}}
    exact |= {"lora": {**LORA, "dropout": 0.0}, "memory": {"rehearse": False}, "evaluate": {"metric": "none"}}
    losses = []
    for number, (micro, pieces) in enumerate([(1, 1), (3, 1), (3, 5)]):
        train = {**TRAIN, "objective": "orpo", "micro_batch": micro, "gradient_accumulation": 3 // micro}
        folder = tmp_path / str(number)
        folder.mkdir()
        path = recipe(folder, tiny_base, "orpo", **exact, train=train)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("qtune.train.learner.pieces_to_begin_with", lambda apart, pieces=pieces: pieces)
            assert qtune("run", path, "--output", folder / "run") == 0
        losses.append([event.loss for event in told(folder / "run", StepDone)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("objective", ["dpo", pytest.param("orpo", marks=pytest.mark.long)])
def test_two_ranks_train_what_one_does(objective: str, tiny_base: Path, tmp_path: Path) -> None:
    exact = {"model": {"base": str(tiny_base), "quantization": "none", "compute_dtype": "float32"}}
    exact |= {"lora": {**LORA, "dropout": 0.0}, "memory": {"rehearse": False}}
    path = recipe(tmp_path, tiny_base, objective, **exact)
    assert qtune("run", path, "--output", tmp_path / "one") == 0
    arguments = ["-m", "qtune", "run", str(path), "--output", str(tmp_path / "two")]
    ended = Launch(2, arguments, env={"QTUNE_RANKS_LIMIT": "60s"}).wait()
    assert [each.returncode for each in ended] == [0, 0], ended
    for kind in (StepDone, Evaluated, Scored):
        one, two = ([event.loss for event in told(tmp_path / name, kind)] for name in ("one", "two"))
        assert two == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "told_of"),
    [
        ({"train": {"objective": "sft"}}, 'pairs of answers, which train.objective = "dpo" or "orpo" learns from'),
        ({"train": {"objective": "dpo"}, "evaluate": {"canaries": 1}}, "planted rows are no pairs"),
        ({"train": {"objective": "best"}}, "train.objective"),
        ({"train": {"objective": "dpo", "beta": 0}}, "train.beta"),
    ],
)
def test_what_does_not_go_together_is_refused(
    tiny_base: Path, tmp_path: Path, capsys: Any, changes: dict[str, Any], told_of: str
) -> None:
    path = recipe(tmp_path, tiny_base, "dpo", **changes)
    assert qtune("run", path, "--output", tmp_path / "run") == 2
    assert told_of in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_rows_are_named_by_file_and_line(tiny_base: Path, tmp_path: Path, capsys: Any) -> None:
    path = recipe(tmp_path, tiny_base, "dpo")
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "q", "chosen": "a", "rejected": "a"}) + "\n")
        file.write(json.dumps({"prompt": "q", "chosen": "a"}) + "\n")
    assert qtune("run", path, "--output", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert f"rows.jsonl:{ROWS + 1}: chosen and rejected are the same" in error
    assert f"rows.jsonl:{ROWS + 2}: has no column for the rejected" in error
