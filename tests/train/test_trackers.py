"""Experiment trackers: a package that is not there is named before anything loads; TensorBoard gets our own losses."""

import subprocess
import sys
from pathlib import Path

import pytest

from qtune import cli
from qtune.errors import MachineError
from qtune.events import Evaluated, StepDone
from qtune.rundir import RunDir
from qtune.train import trackers

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
"""


def losses(run: RunDir) -> tuple[dict[int, float], dict[int, float]]:
    """Loss by step and held-out loss by step, as the run folder keeps them."""
    events = list(run.events())
    steps = {event.step: event.loss for event in events if isinstance(event, StepDone)}
    return steps, {event.step: event.loss for event in events if isinstance(event, Evaluated)}


def test_tensorboard_carries_our_losses_and_changes_nothing(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A held-out loss told to a tracker once cost the step that it came with its own log line."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.chdir(tmp_path)
    rows = [f'{{"question": "Is {i} odd?", "answer": "{"yes" if i % 2 else "no"}"}}\n' for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    (tmp_path / "t.toml").write_text(RECIPE.format(base=tiny_base))
    assert cli.main(["run", "t.toml", "--output", "plain"]) == 0
    assert cli.main(["run", "t.toml", "--output", "tracked", "--set", "report.to=tensorboard"]) == 0
    steps, held_out = losses(RunDir(tmp_path / "tracked"))
    assert (list(steps), list(held_out)) == ([1, 2, 3, 4, 5, 6], [2, 4, 6])
    assert (steps, held_out) == losses(RunDir(tmp_path / "plain"))
    (written,) = (tmp_path / "tracked").rglob("events.out.tfevents.*")
    assert not list((tmp_path / "plain").rglob("events.out.tfevents.*"))
    told = accumulator.EventAccumulator(str(written.parent))
    told.Reload()
    for tag, ours in (("train/loss", steps), ("eval/loss", held_out)):
        assert {event.step: event.value for event in told.Scalars(tag)} == pytest.approx(ours, rel=1e-6)
    assert "library_name: peft" in (tmp_path / "tracked" / "adapter" / "README.md").read_text()


def test_an_absent_tracker_is_named_with_what_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(MachineError, match=r'^report.to = "mlflow" needs .* not installed: pip install mlflow$'):
        trackers.refuse_absent("mlflow")
    trackers.refuse_absent(None)


def test_a_folder_that_a_tracker_left_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "leftover_of_a_tracker").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MachineError, match="pip install leftover_of_a_tracker"):
        trackers.refuse_absent("leftover_of_a_tracker")


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
    assert result.stderr == 'report.to = "wandb" needs the package wandb, which is not installed: pip install wandb\n'


def test_an_unknown_tracker_is_a_fault_of_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    (tmp_path / "t.toml").write_text(RECIPE.format(base="demo") + '[report]\nto = "tensorbord"\n')
    assert cli.main(["check", "t.toml"]) == 2
    assert "t.toml:16: report.to" in capsys.readouterr().err
