"""Experiment trackers: what is not there is named before anything loads; each gets our own losses; none ends a run."""

import json
import os
import pty
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import TrainerState
from transformers.integrations import TensorBoardCallback

from qtune import cli
from qtune.errors import MachineError
from qtune.events import Evaluated, Notice, StepDone
from qtune.rundir import RunDir
from qtune.train import trackers
from qtune.train.trackers import TRACKERS, Tracker

RECIPE = """\
name = "t"
[model]
base = "{base}"
[data]
train = "rows.jsonl"
held_out_fraction = 0.2
max_tokens = 64
[train]
max_steps = 6
epochs = 50
eval_every = 2
gradient_accumulation = 1
[evaluate]
metric = "none"
general = "none"
"""


def losses(run: RunDir) -> tuple[dict[int, float], dict[int, float]]:
    """Loss by step and held-out loss by step, as the run folder keeps them."""
    events = list(run.events())
    steps = {event.step: event.loss for event in events if isinstance(event, StepDone)}
    return steps, {event.step: event.loss for event in events if isinstance(event, Evaluated)}


def notices(run: RunDir) -> list[str]:
    return [event.text for event in run.events() if isinstance(event, Notice)]


@pytest.fixture(scope="module")
def plain(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run that is told to no tracker, with its recipe and rows beside it."""
    folder = tmp_path_factory.mktemp("plain")
    rows = [f'{{"question": "Is {i} odd?", "answer": "{"yes" if i % 2 else "no"}"}}\n' for i in range(30)]
    (folder / "rows.jsonl").write_text("".join(rows))
    (folder / "t.toml").write_text(RECIPE.format(base=tiny_base))
    assert cli.main(["run", str(folder / "t.toml"), "--output", str(folder / "plain")]) == 0
    return RunDir(folder / "plain")


@pytest.fixture
def tracked(plain: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], RunDir]:
    """The same run told to a tracker, from an empty folder; its losses must be those of the plain one."""
    monkeypatch.chdir(tmp_path)
    for name in (name for tracker in TRACKERS.values() for name in tracker.settings):
        monkeypatch.setenv(name, "is taken back when the test ends")
        monkeypatch.delenv(name)

    def run_with(tracker: str) -> RunDir:
        recipe, report_to = str(plain.path.parent / "t.toml"), f"report.to={tracker}"
        assert cli.main(["run", recipe, "--output", "tracked", "--set", report_to]) == 0
        run = RunDir(tmp_path / "tracked")
        assert losses(run) == losses(plain)
        return run

    return run_with


def test_tensorboard_carries_our_losses_and_changes_nothing(plain: RunDir, tracked: Callable[[str], RunDir]) -> None:
    """A held-out loss told to a tracker once cost the step that it came with its own log line."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = tracked("tensorboard")
    steps, held_out = losses(run)
    assert (list(steps), list(held_out)) == ([1, 2, 3, 4, 5, 6], [2, 4, 6])
    (written,) = run.path.rglob("events.out.tfevents.*")
    assert not list(plain.path.rglob("events.out.tfevents.*"))
    told = accumulator.EventAccumulator(str(written.parent))
    told.Reload()
    for tag, ours in (("train/loss", steps), ("eval/loss", held_out)):
        assert {event.step: event.value for event in told.Scalars(tag)} == pytest.approx(ours, rel=1e-6)
    assert "library_name: peft" in (run.adapter / "README.md").read_text()


@pytest.mark.long
def test_a_tracker_that_cannot_begin_ends_no_run(
    tmp_path: Path, tracked: Callable[[str], RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose server did not answer ended the run, after the base had been scored."""
    pytest.importorskip("tensorboard")
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "file" / "below"))
    run = tracked("tensorboard")
    [said] = [text for text in notices(run) if "tensorboard" in text]
    assert said.startswith("tensorboard failed and is told no more: ")
    assert str(tmp_path / "file") in said
    assert run.scores.is_file()


@pytest.mark.long
def test_a_tracker_that_fails_later_is_told_no_more(
    tracked: Callable[[str], RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    asked: list[int] = []

    def fail(self: object, args: object, state: TrainerState, *others: object, **kwargs: object) -> None:
        asked.append(state.global_step)
        if state.global_step == 3:
            raise ConnectionError("the line is cut.\nsecond line")

    monkeypatch.setattr(TensorBoardCallback, "on_log", fail)
    run = tracked("tensorboard")
    assert asked == [1, 2, 2, 3]
    said = "tensorboard failed and is told no more: the line is cut. The run goes on, and keeps it all."
    assert notices(run).count(said) == 1


def test_mlflow_gets_our_losses_and_the_name_of_the_run(
    tmp_path: Path, tracked: Callable[[str], RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed, as it is large: pip install mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/told.db")
    steps, held_out = losses(tracked("mlflow"))
    with sqlite3.connect(tmp_path / "told.db") as database:
        assert database.execute("SELECT name, status FROM runs").fetchall() == [("tracked", "FINISHED")]
        for key, ours in (("loss", steps), ("eval_loss", held_out)):
            found = dict(database.execute("SELECT step, value FROM metrics WHERE key = ?", (key,)).fetchall())
            assert found == pytest.approx(ours, rel=1e-6)


def test_trackio_gets_our_losses_and_the_name_of_the_run(
    tmp_path: Path, tracked: Callable[[str], RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trackio", reason="trackio is not installed: pip install trackio")
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "told")
    steps, held_out = losses(tracked("trackio"))
    with sqlite3.connect(tmp_path / "told" / "qtune.db") as database:
        rows = database.execute("SELECT run_name, metrics FROM metrics").fetchall()
    assert {name for name, _ in rows} == {"tracked"}
    told = [json.loads(metrics) for _, metrics in rows]
    for key, ours in (("train/loss", steps), ("eval/loss", held_out)):
        found = {each["train/global_step"]: each[key] for each in told if key in each}
        assert found == pytest.approx(ours, rel=1e-6)


def test_wandb_gets_our_losses_and_not_the_terminal(
    tmp_path: Path, tracked: Callable[[str], RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It kept all that the terminal showed, rows of the data too, in a project called huggingface."""
    wandb = pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    _, held_out = losses(tracked("wandb"))
    wandb.teardown()  # waits until all is written
    (told,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    content = told.read_bytes()
    assert all(word in content for word in (b"tracked", b"qtune", b"train/loss", b"train/learning_rate", b"eval/loss"))
    assert str(held_out[2]).encode() in content
    assert b"huggingface" not in content
    assert not (told.parent / "files" / "output.log").exists()


def test_wandb_asks_nobody_to_log_in(plain: RunDir, tmp_path: Path) -> None:
    """It asked when training began; with nobody to ask it ended the run there."""
    pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")
    theirs = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment = {**theirs, "NETRC": str(tmp_path / "netrc"), "HOME": str(tmp_path)}
    command = [sys.executable, "-m", "qtune", "check", str(plain.path.parent / "t.toml"), "--set", "report.to=wandb"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    said = result.stderr
    assert result.returncode == 2
    assert 'report.to = "wandb": nobody is logged in to it here' in said
    assert "WANDB_MODE=offline" in said


def test_nobody_is_asked_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, side = pty.openpty()
    with os.fdopen(side) as keyboard, os.fdopen(terminal):
        monkeypatch.setattr(sys, "stdin", keyboard)
        assert sys.stdin.isatty()
        with trackers.nobody_to_ask():
            assert not sys.stdin.isatty()
            assert sys.stdin.read() == ""
        assert sys.stdin is keyboard


def test_an_absent_tracker_is_named_with_what_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(MachineError, match=r'^report.to = "mlflow" needs .* not installed: pip install mlflow$'):
        TRACKERS["mlflow"].make_ready()


def test_a_folder_that_a_tracker_left_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "leftover_of_a_tracker").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MachineError, match="pip install leftover_of_a_tracker"):
        Tracker("left", package="leftover_of_a_tracker").make_ready()


@pytest.mark.parametrize("verb", ["run", "check"])
def test_it_is_said_before_torch_loads(tmp_path: Path, verb: str) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "a", "answer": "b"}\n' * 9)
    (tmp_path / "t.toml").write_text(RECIPE.format(base="demo"))
    code = (
        "import sys; from qtune import cli; from qtune.train import trackers\n"
        "trackers.find_spec = lambda name: None\n"
        f"code = cli.main(['{verb}', 't.toml', '--set', 'report.to=wandb'])\n"
        "sys.exit(99 if 'torch' in sys.modules else code)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    why = 'report.to = "wandb" needs the package wandb, which is not installed: pip install wandb'
    assert result.stderr.splitlines()[-1] == f"--set report.to=wandb: {why}"


def test_an_unknown_tracker_is_a_fault_of_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    (tmp_path / "t.toml").write_text(RECIPE.format(base="demo") + '[report]\nto = "tensorbord"\n')
    assert cli.main(["check", "t.toml"]) == 2
    assert "t.toml:17: report.to" in capsys.readouterr().err
