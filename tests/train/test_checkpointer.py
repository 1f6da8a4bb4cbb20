"""Checkpoints of real runs: when they are written, what is in them, which stay, and that going on from one is exact."""

import dataclasses
import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stopped_runs import (
    ADAPTER,
    STEPS,
    assert_same,
    before_step,
    checkpoints,
    copy,
    held_out_losses,
    plans_made_once,
    qtune,
    send,
    told,
    without_times,
    write_recipe,
)

from qtune import atomic_files
from qtune.errors import RunFolderError
from qtune.events import Answered, CheckpointSaved, Evaluated, Finished, Notice, Resumed, Scored, StepDone
from qtune.library import open_run
from qtune.train.callbacks import Reporter
from qtune.train.checkpoint_files import Checkpoint
from qtune.train.trainer import MeteredTrainer


@pytest.fixture(autouse=True, scope="module")
def quick_plans():
    with plans_made_once():
        yield


@pytest.fixture(scope="module")
def alone(tiny_base, tmp_path_factory) -> Path:
    """A run that was left alone, with a checkpoint after each of its steps and two steps to a log line.

    An epoch is three steps of three rows, and one of two.
    """
    folder = tmp_path_factory.mktemp("alone")
    recipe = write_recipe(folder, tiny_base, data={"max_rows": 14}, save={"every": 1, "keep": 100}, train=TRAIN)
    assert qtune("run", recipe, "--output", folder / "run") == 0
    return folder / "run"


TRAIN = {"optimizer": "paged_adamw_8bit", "gradient_accumulation": 3, "log_every": 2}


def test_a_checkpoint_is_what_its_docstring_lists(alone: Path) -> None:
    folder = alone / "checkpoints" / "step-00000004"
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == {
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "optimizer.safetensors",
        "random.safetensors",
        "state.json",
        "lock.json",
        "SHA256SUMS",
    }
    assert atomic_files.what_is_broken(folder) is None


def test_a_run_folder_holds_nothing_that_has_to_be_unpickled(alone: Path) -> None:
    names = [path.name for path in alone.rglob("*") if path.is_file()]
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    assert not [name for name in names if "training_args" in name or "trainer_state" in name]


@pytest.mark.parametrize("step", [0, 3, 4, STEPS])
def test_going_on_is_exact_from_anywhere(alone: Path, tmp_path: Path, step: int) -> None:
    """At 0 there is no checkpoint yet, 3 is inside a log window and an epoch, 4 ends both, and 8 is the last."""
    run = copy(alone, tmp_path / "run", up_to=step)
    assert qtune("resume", run) == 0
    assert_same(run, alone)
    resumed = told(run, Resumed)[-1]
    assert resumed.step == step
    assert ("begins again" in resumed.text) == (step == 0)


@pytest.mark.parametrize(
    ("model", "train", "dropout"),
    [
        pytest.param({"quantization": "none"}, {"optimizer": "adamw"}, 0.2, marks=pytest.mark.long),
        ({"quantization": "nf4"}, {"optimizer": "adamw_8bit"}, 0.0),
        (
            {"quantization": "nf4"},
            {"optimizer": "schedule_free_adamw", "lora_plus_ratio": 8.0, "neftune_alpha": 5.0, "eval_every": 2},
            0.0,
        ),
        pytest.param(
            {"quantization": "nf4"}, {"optimizer": "ademamix_8bit", "schedule": "wsd"}, 0.0, marks=pytest.mark.long
        ),
        pytest.param(
            {"quantization": "nf4"},
            {"optimizer": "muon", "schedule": "cosine_restarts", "lora_plus_ratio": 2.0},
            0.0,
            marks=pytest.mark.long,
        ),
        pytest.param({"quantization": "nf4"}, {"optimizer": "lion_8bit"}, 0.0, marks=pytest.mark.long),
    ],
)
def test_going_on_is_exact_for_other_ways_to_train(tiny_base, tmp_path, model, train, dropout) -> None:
    recipe = write_recipe(
        tmp_path,
        tiny_base,
        model={"base": str(tiny_base), **model},
        lora={"dropout": dropout},
        data={"packing": True, "max_tokens": 64},
        train={"gradient_accumulation": 3, **train},
        save={"every": 1, "keep": 100},
    )
    assert qtune("run", recipe, "--output", tmp_path / "alone") == 0
    half = len(checkpoints(tmp_path / "alone")) // 2
    run = copy(tmp_path / "alone", tmp_path / "run", up_to=half - 1)
    assert qtune("resume", run) == 0
    assert_same(run, tmp_path / "alone")


def test_a_run_that_goes_on_with_more_steps_says_at_what_rate(alone: Path, tmp_path: Path) -> None:
    """A cosine that had come to its end begins to fall from higher up: that was done in silence."""
    run = copy(alone, tmp_path / "run", up_to=STEPS)
    assert qtune("resume", run, "--set", "train.epochs=3", "--allow-change", "train.epochs") == 0
    (first,) = [done for done in told(run, StepDone) if done.step == STEPS + 2]  # two steps to a line
    text = told(run, Resumed)[-1].text
    assert "Step 9 is taken at a learning rate of" in text
    assert "it would have been 0" in text
    assert 0 < first.learning_rate < 3e-3


def test_checkpoints_come_at_their_interval_at_the_best_loss_and_at_the_end(tiny_base, tmp_path) -> None:
    recipe = write_recipe(tmp_path, tiny_base, save={"every": 3, "keep": 1}, train={"eval_every": 5})
    assert qtune("run", recipe, "--output", tmp_path / "run") == 0
    run = tmp_path / "run"
    best = [event.step for event in told(run, Evaluated) if event.is_best]
    assert [event.step for event in told(run, CheckpointSaved)] == sorted({3, 6, STEPS, *best})
    assert checkpoints(run) == sorted({best[-1], STEPS})
    assert [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")] == []


def test_the_best_is_kept_however_old_it_is(tiny_base, tmp_path) -> None:
    """The first evaluation is the best one, as a rate this high only spoils what there is."""
    recipe = write_recipe(tmp_path, tiny_base, save={"every": 1, "keep": 1}, train={"eval_every": 1})
    after = iter([1.0, 0.5, *[2.0] * STEPS])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qtune.run.measured", lambda *args: (next(after), {}))
        with before_step(5, send(signal.SIGTERM)):
            assert qtune("run", recipe, "--output", tmp_path / "run") == 143
        first = checkpoints(tmp_path / "run")
        assert qtune("resume", tmp_path / "run") == 0
    best = [event.step for event in told(tmp_path / "run", Evaluated) if event.is_best][-1]
    assert best < 4
    assert first == [best, 5]
    assert checkpoints(tmp_path / "run") == [best, STEPS]


def test_a_checkpoint_can_be_asked_for(tiny_base, tmp_path) -> None:
    recipe = write_recipe(tmp_path, tiny_base, save={"every": "1h"}, data={"held_out_fraction": 0.0})
    run = tmp_path / "run"
    with before_step(3, lambda: (run / "CHECKPOINT").touch()):
        assert qtune("run", recipe, "--output", run) == 0
    assert [event.step for event in told(run, CheckpointSaved)] == [3, told(run, Finished)[0].steps]
    assert not (run / "CHECKPOINT").exists()


def test_an_interval_may_be_a_time(tiny_base, tmp_path) -> None:
    recipe = write_recipe(tmp_path, tiny_base, save={"every": "0.001s", "keep": 100}, data={"held_out_fraction": 0.0})
    assert qtune("run", recipe, "--output", tmp_path / "run") == 0
    assert checkpoints(tmp_path / "run") == list(range(1, told(tmp_path / "run", Finished)[0].steps + 1))


@pytest.mark.parametrize(
    ("numbers", "code", "steps"),
    [
        ((signal.SIGTERM,), 143, 4),
        ((signal.SIGINT,), 130, 4),
        ((signal.SIGTERM, signal.SIGTERM), 143, 2),
        ((signal.SIGTERM, signal.SIGINT), 130, 2),
    ],
)
def test_a_signal_saves_and_a_second_one_does_not_wait(alone, tmp_path, numbers, code, steps) -> None:
    """The step goes on to its end and is saved; at once is without it, and the run goes on exactly either way."""
    run = copy(alone, tmp_path / "run", up_to=2)
    with before_step(4 if len(numbers) == 1 else 3, send(*numbers)):
        assert qtune("resume", run) == code
    assert checkpoints(run)[-1] == steps
    assert all(atomic_files.what_is_broken(path) is None for path in (run / "checkpoints").iterdir())
    assert (run / ADAPTER).read_bytes() == (alone / "checkpoints" / f"step-{steps:08}" / ADAPTER).read_bytes()
    assert qtune("resume", run) == 0
    assert_same(run, alone)


@pytest.mark.parametrize("step", [4, 5, 6])
def test_a_step_that_is_dropped_leaves_the_one_before_it(alone, tmp_path, step: int) -> None:
    """A second Ctrl-C kept no checkpoint of the last whole step, so all since the one before were done again.

    Step 4 follows one that was saved, 5 begins an epoch, 6 is inside a log window.
    """
    run = copy(alone, tmp_path / "run", up_to=2)
    compute, passes = MeteredTrainer.compute_loss, []

    def compute_and_send(self, *args, **kwargs):
        if self.state.global_step == step - 1:
            passes.append(step)
            send(*[signal.SIGINT] * (2 if len(passes) == 2 else 0))()
        return compute(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MeteredTrainer, "compute_loss", compute_and_send)
        assert qtune("resume", run, "--set", "save.every=100", "--allow-change", "save.every") == 130
    assert len(passes) == 2
    assert checkpoints(run)[-1] == step - 1
    assert told(run, Finished)[-1].steps == step - 1
    assert (run / ADAPTER).read_bytes() == (alone / "checkpoints" / f"step-{step - 1:08}" / ADAPTER).read_bytes()
    assert qtune("resume", run) == 0
    assert_same(run, alone)


def test_a_held_out_loss_that_is_dropped_leaves_its_step(alone, tmp_path) -> None:
    run = copy(alone, tmp_path / "run", up_to=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reporter, "evaluate", lambda *args: send(signal.SIGINT, signal.SIGINT)())
        assert qtune("resume", run, "--set", "save.every=100", "--allow-change", "save.every") == 130
    assert checkpoints(run)[-1] == 3
    assert qtune("resume", run) == 0
    assert (run / ADAPTER).read_bytes() == (alone / ADAPTER).read_bytes()
    assert [done.loss for done in told(run, StepDone)] == [done.loss for done in told(alone, StepDone)]


@pytest.mark.parametrize(("step", "is_told"), [(1, True), (2, False)])
def test_a_checkpoint_whose_warm_up_began_at_nought_is_taken_and_says_so(
    alone, tmp_path, step: int, is_told: bool
) -> None:
    run = copy(alone, tmp_path / "run", up_to=step)
    path = run / "checkpoints" / f"step-{step:08}"
    (path / "state.json").write_text(json.dumps({**json.loads((path / "state.json").read_text()), "format": 2}))
    atomic_files.seal(path)
    assert qtune("resume", run, "--set", "train.warmup_fraction=0.2", "--allow-change", "train.warmup_fraction") == 0
    assert ("began at nought" in told(run, Resumed)[-1].text) == is_told


def poisoned(what: str, step: int):
    """The loss, or its gradient alone, is no number in `step`."""
    compute = MeteredTrainer.compute_loss

    def compute_poisoned(self, *args, **kwargs):
        loss = compute(self, *args, **kwargs)
        if self.state.global_step != step - 1:
            return loss
        if what == "gradient":
            loss.register_hook(lambda gradient: gradient * float("inf"))
            return loss
        return loss * float("nan")

    return compute_poisoned


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_no_number_is_not_taken(alone, tmp_path, capsys, what: str) -> None:
    run = copy(alone, tmp_path / "run", up_to=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MeteredTrainer, "compute_loss", poisoned(what, 5))
        assert qtune("resume", run) == 1
    said = capsys.readouterr().err
    assert f"Step 5: the {what} is not a finite number, so the step was not taken. It was made of rows.jsonl:" in said
    assert "train.learning_rate is 0.003" in said
    assert said.count("\n") == 1
    assert checkpoints(run)[-1] == 4
    assert (run / ADAPTER).read_bytes() == (alone / "checkpoints" / "step-00000004" / ADAPTER).read_bytes()
    assert all(torch.isfinite(weight).all() for weight in load_file(run / ADAPTER).values())
    assert qtune("resume", run) == 0
    assert_same(run, alone)


def test_a_loss_that_rises_is_said_once_however_often_the_run_is_stopped(alone, tmp_path) -> None:
    run = copy(alone, tmp_path / "run", up_to=2)
    compute = MeteredTrainer.compute_loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MeteredTrainer, "compute_loss", lambda self, *args, **kwargs: 5 * compute(self, *args, **kwargs))
        with before_step(5, send(signal.SIGTERM)):
            assert qtune("resume", run) == 143
        assert qtune("resume", run) == 0
    notices = [event.text for event in told(run, Notice) if "times that of the first step" in event.text]
    assert len(notices) == 1
    assert notices[0].startswith("The loss at step 4 is ")
    assert max(step.loss for step in told(run, StepDone)) > 3 * told(run, StepDone)[0].loss


@pytest.mark.parametrize("size", [40, pytest.param(3_000, marks=pytest.mark.long), 60_000])
def test_a_full_disk_ends_the_run_in_one_sentence(alone, tmp_path, capsys, file_size_limit, size: int) -> None:
    """safetensors' own error for it was not known, and ended in a traceback."""
    run = copy(alone, tmp_path / "run", up_to=2)
    with before_step(4, lambda: file_size_limit(size)):
        assert qtune("resume", run) == 1
    file_size_limit(-1)
    said = capsys.readouterr().err
    assert "cannot be written, the disk is full. Free some space and go on with `qtune resume`." in said
    assert said.count("\n") == 1
    assert checkpoints(run)[-1] == 3
    assert qtune("resume", run) == 0
    assert_same(run, alone)


def test_a_checkpoint_of_another_version_is_not_guessed_at(alone, tmp_path) -> None:
    path = copy(alone, tmp_path / "run") / "checkpoints" / "step-00000008"
    values = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**values, "format": 99}))
    with pytest.raises(RunFolderError, match="was written by another version of qtune"):
        Checkpoint.read(path)


def recipe_of_best(folder: Path, base: Path, keep: int = 1, every: int = 100, **train: object) -> Path:
    """Eight steps with a held-out loss after every second of them; the best one's adapter is the result."""
    save = {"every": every, "keep": keep, "result": "best"}
    return write_recipe(folder, base, data={"max_rows": 14}, save=save, train={**TRAIN, "eval_every": 2, **train})


@pytest.fixture(scope="module")
def of_best(tiny_base, tmp_path_factory) -> Path:
    """A run whose held-out loss is said to be best after four steps of eight."""
    folder = tmp_path_factory.mktemp("of_best")
    with held_out_losses(4.0, 2.0, 3.0, 2.5):
        assert qtune("run", recipe_of_best(folder, tiny_base), "--output", folder / "run") == 0
    return folder / "run"


def test_the_result_may_be_the_adapter_of_the_best_held_out_loss(of_best: Path) -> None:
    weights = load_file(of_best / ADAPTER)
    best, last = (load_file(of_best / "checkpoints" / f"step-{step:08}" / ADAPTER) for step in (4, STEPS))
    assert all(torch.equal(weights[name], best[name]) for name in best)
    assert not all(torch.equal(weights[name], last[name]) for name in last)
    assert [notice.text for notice in told(of_best, Notice) if "of step 4," in notice.text]
    assert "best held-out 2.000 at step 4, which the adapter is of" in (of_best / "summary.md").read_text()


def test_a_run_that_is_done_and_gone_on_with_has_the_best_again(of_best: Path, tmp_path: Path) -> None:
    run = copy(of_best, tmp_path / "run", up_to=STEPS)
    assert qtune("resume", run) == 0
    assert (run / ADAPTER).read_bytes() == (of_best / ADAPTER).read_bytes()


def test_the_best_is_refused_where_no_row_is_held_out(tiny_base, tmp_path: Path, capsys) -> None:
    """The sentence came a letter a line."""
    data, settings = {"held_out_fraction": 0.0}, {"save": {"result": "best"}, "train": {"patience": 2}}
    recipe = write_recipe(tmp_path, tiny_base, data=data, evaluate={"rows": 0}, **settings)
    assert qtune("run", recipe, "--output", tmp_path / "run") == 2
    said = capsys.readouterr().err
    lines = recipe.read_text().split("\n")
    for setting, key in (('result = "best"', 'save.result: is "best"'), ("patience = 2", "train.patience: is 2")):
        assert f"t.toml:{lines.index(setting) + 1}: {key}, and no row is held out to tell which step is best." in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("step", [3, 7])
def test_a_run_that_was_stopped_has_the_best_all_the_same(of_best: Path, tiny_base, tmp_path, step: int) -> None:
    """Before the best one, and after one that was no better; only what its checkpoint says is known then."""
    run, losses = tmp_path / "run", (4.0, 2.0, 3.0, 2.5)
    with held_out_losses(*losses), before_step(step, send(signal.SIGTERM)):
        assert qtune("run", recipe_of_best(tmp_path, tiny_base), "--output", run) == 143
    with held_out_losses(*losses[len(told(run, Evaluated)) :]):
        assert qtune("resume", run) == 0
    assert_same(run, of_best)
    best = run / "checkpoints" / "step-00000004" / ADAPTER
    assert (run / ADAPTER).read_bytes() == best.read_bytes()


@pytest.fixture(scope="module")
def out_of_patience(tiny_base, tmp_path_factory) -> Path:
    """A run that is done after six steps of eight, as two held-out losses were no better than the first."""
    folder = tmp_path_factory.mktemp("out_of_patience")
    recipe = recipe_of_best(folder, tiny_base, keep=100, every=1, patience=2)
    with held_out_losses(2.0, 3.0, 2.5):
        assert qtune("run", recipe, "--output", folder / "run") == 0
    return folder / "run"


def test_training_ends_when_patience_does(out_of_patience: Path) -> None:
    ended = told(out_of_patience, Finished)[-1]
    assert (ended.steps, ended.without_better) == (6, 2)
    assert [event.step for event in told(out_of_patience, Evaluated)] == [2, 4, 6]
    best = out_of_patience / "checkpoints" / "step-00000002" / ADAPTER
    assert (out_of_patience / ADAPTER).read_bytes() == best.read_bytes()
    assert [event.who for event in told(out_of_patience, Scored)] == ["base", "tuned"]


def test_that_it_is_done_is_told_everywhere(out_of_patience: Path, capsys) -> None:
    sentence = "done at step 6 of 8, with no better held-out loss in 2"
    assert qtune("report", out_of_patience) == 0
    assert sentence in " ".join(capsys.readouterr().out.split())
    assert qtune("report", out_of_patience, "--json") == 0
    assert json.loads(capsys.readouterr().out)["done_early"] == sentence
    assert qtune("ls", out_of_patience, "--json") == 0
    (listed,) = json.loads(capsys.readouterr().out)
    assert (listed["state"], listed["steps_done"], listed["without_better"]) == ("finished", 6, 2)
    assert qtune("ls", out_of_patience) == 0
    assert "finished at step 6 of 8, with no better held-out loss in 2" in capsys.readouterr().out
    summary = (out_of_patience / "summary.md").read_text()
    assert "Done at step 6 of 8, with no better held-out loss in 2 (train.patience)." in summary
    assert "qtune resume" not in summary
    run = open_run(out_of_patience)
    assert (run.state, run.done_early) == ("finished", sentence)


def test_patience_counts_over_a_stop(out_of_patience: Path, tiny_base, tmp_path) -> None:
    """Stopped when one loss of two was no better."""
    run, losses = tmp_path / "run", (2.0, 3.0, 2.5)
    recipe = recipe_of_best(tmp_path, tiny_base, keep=100, every=1, patience=2)
    with held_out_losses(*losses), before_step(5, send(signal.SIGTERM)):
        assert qtune("run", recipe, "--output", run) == 143
    with held_out_losses(*losses[len(told(run, Evaluated)) :]):
        assert qtune("resume", run) == 0
    assert_same(run, out_of_patience)


def test_a_run_that_ended_by_patience_says_that_it_is_done(out_of_patience: Path, tmp_path: Path) -> None:
    run = copy(out_of_patience, tmp_path / "run", up_to=STEPS)
    with held_out_losses():
        assert qtune("resume", run) == 0
    assert "Training is done: it ended there by train.patience." in told(run, Resumed)[-1].text
    assert_same(run, out_of_patience)
    with held_out_losses(1.0):
        more = ("--set", "train.patience=3", "--allow-change", "train.patience")
        assert qtune("resume", run, *more) == 0
    assert told(run, Finished)[-1] == dataclasses.replace(told(run, Finished)[-1], steps=STEPS, without_better=0)


def test_patience_that_the_last_step_ends_too_is_an_end_like_any_other(tiny_base, tmp_path: Path) -> None:
    recipe = recipe_of_best(tmp_path, tiny_base, patience=3)
    with held_out_losses(1.0, 2.0, 2.0, 2.0):
        assert qtune("run", recipe, "--output", tmp_path / "run") == 0
    ended = told(tmp_path / "run", Finished)[-1]
    assert (ended.steps, ended.without_better) == (STEPS, 0)


def test_a_loss_that_is_no_number_is_no_better_one(tiny_base, tmp_path: Path) -> None:
    recipe = recipe_of_best(tmp_path, tiny_base, patience=2)
    with held_out_losses(float("nan"), float("nan")):
        assert qtune("run", recipe, "--output", tmp_path / "run") == 0
    assert told(tmp_path / "run", Finished)[-1].without_better == 2


def test_rows_that_are_watched_are_answered_at_every_held_out_loss(tiny_base, tmp_path, capsys) -> None:
    """The run is the same with and without, but for what it says, and goes on to the bit."""
    changes = {"data": {"max_rows": 14}, "train": {**TRAIN, "eval_every": 3}, "save": {"every": 1, "keep": 100}}
    plain, watched = tmp_path / "plain", tmp_path / "watched"
    for run, evaluate in ((plain, {}), (watched, {"watch": 2, "max_new_tokens": 3})):
        recipe = write_recipe(tmp_path, tiny_base, evaluate=evaluate, **changes)
        assert qtune("run", recipe, "--output", run) == 0
    said, answered = capsys.readouterr().out, told(watched, Answered)
    assert [event.step for event in answered] == [event.step for event in told(watched, Evaluated)] == [3, 6, 8]
    assert len({event.prompts for event in answered}) == 1
    assert all(len(event.prompts) == len(event.answers) == 2 for event in answered)
    assert (watched / ADAPTER).read_bytes() == (plain / ADAPTER).read_bytes()
    assert [each for each in without_times(watched) if each["event"] != "answers"] == without_times(plain)
    assert f'answers: "{answered[0].prompts[0]}" → ' in said
    assert "## Answers while it trained" in (watched / "summary.md").read_text()
    assert open_run(watched).watched[answered[0].prompts[1]][8] == answered[-1].answers[1]
    assert qtune("report", watched, "--html") == 0
    assert '<h2 id="watched">' in (watched / "report.html").read_text()
    run = copy(watched, tmp_path / "run", up_to=4)
    assert qtune("resume", run) == 0
    assert_same(run, watched)


def test_prompts_of_ones_own_are_watched_without_held_out_rows(tiny_base, tmp_path: Path) -> None:
    data, prompts = {"held_out_fraction": 0.0, "max_rows": 5}, ["who are you?", "what is x?"]
    recipe = write_recipe(tmp_path, tiny_base, data=data, evaluate={"watch": prompts, "max_new_tokens": 2})
    assert qtune("run", recipe, "--output", tmp_path / "run") == 0
    assert all(list(event.prompts) == prompts for event in told(tmp_path / "run", Answered))
    assert told(tmp_path / "run", Answered)
    assert told(tmp_path / "run", Evaluated) == []


def test_more_rows_than_are_held_out_cannot_be_watched(tiny_base, tmp_path: Path, capsys) -> None:
    recipe = write_recipe(tmp_path, tiny_base, data={"max_rows": 14}, evaluate={"watch": 9})
    assert qtune("run", recipe, "--output", tmp_path / "run") == 2
    line = recipe.read_text().split("\n").index("watch = 9") + 1
    assert f"t.toml:{line}: evaluate.watch: is 9, and 3 held-out rows can be asked." in capsys.readouterr().err
