"""qtune as a library: its names, what it leaves alone in the process that imports it, and what its functions give."""

import json
import os
import subprocess
import sys
from pathlib import Path

import forked
import pytest

import qtune
from qtune.recipe import load

ROOT = Path(__file__).resolve().parent.parent
NAMES = """
    DataError DiskFull DoesNotFit MachineError ModelError OutOfMemory QtuneError Recipe RecipeError Run RunFolderError
    Training TrainingDiverged UserError VerificationFailed check_data errors events finetune load_recipe make_plan
    make_recipe open_run show
"""
UNCHANGED = """
import gc, json, logging, os, signal, sys, warnings

def state():
    loggers = {name: logging.getLogger(name) for name in (None, "transformers", "datasets", "py.warnings")}
    return {
        "environment": dict(os.environ),
        "kernels": "kernels" in sys.modules,
        "collects": gc.isenabled(),
        "frozen": gc.get_freeze_count(),
        "signals": [repr(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)],
        "logging": {str(name): repr((each.handlers, each.propagate, each.level)) for name, each in loggers.items()},
        "warnings": repr(warnings.showwarning),
        "hooks": repr((sys.excepthook, sys.stdout, sys.stderr, sys.meta_path)),
    }

def hold(before, after):
    assert after == before, [(key, before[key], after[key]) for key in before if before[key] != after[key]]
"""


def python(code: str, folder: Path, **environment: str) -> str:
    """What a process of its own prints that runs `code`."""
    path = f"{ROOT}:{ROOT / 'tests' / 'support'}"
    env = {"PYTHONPATH": path, "HOME": str(folder), "QTUNE_CACHE": "off", "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_names_are_these_and_all_are_there() -> None:
    assert sorted(qtune.__all__) == sorted(NAMES.split()) == sorted(set(dir(qtune)) - {"__version__"})
    for name in qtune.__all__:
        assert getattr(qtune, name).__doc__
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        qtune.trian  # noqa: B018


def test_importing_it_loads_nothing_and_changes_nothing(tmp_path: Path) -> None:
    """It set a variable, and hid a package from everybody."""
    code = f"{UNCHANGED}\nbefore = state()\nimport qtune\nhold(before, state())\nprint([*sys.modules])"
    loaded = set(eval(python(code, tmp_path)))
    assert not loaded & {"torch", "transformers", "pydantic", "rich", "numpy"}


@pytest.mark.long
def test_a_process_is_as_it_was_after_a_check_and_a_plan(tmp_path: Path) -> None:
    """The libraries themselves change it when they are imported, so they are first."""
    code = f"""{UNCHANGED}
import bitsandbytes, datasets, peft, transformers, trl
from huggingface_hub import constants
draws = transformers.utils.logging.is_progress_bar_enabled()
compiler = transformers.modeling_utils.torch.compile
before = state()
import qtune
recipe = qtune.load_recipe("medical", demo=True)
checked, plan = qtune.check_data(recipe), qtune.make_plan(recipe, "8GiB")
hold(before, state())
assert (draws, False) == (transformers.utils.logging.is_progress_bar_enabled(), constants.HF_HUB_OFFLINE)
assert compiler is transformers.modeling_utils.torch.compile
print(checked.outcome, plan.fits, plan.device.total_bytes)
"""
    assert python(code, tmp_path).split() == ["warnings", "True", str(8 * 2**30)]


@pytest.mark.long
def test_kernels_of_others_are_not_fetched_by_its_imports(tmp_path: Path) -> None:
    """A host may have the package `kernels`: bitsandbytes would run code of the hub while it is imported."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("def get_kernel(*args, **kwargs):\n    print('fetched')\n")
    code = """
import qtune
recipe = qtune.load_recipe("medical", demo=True)
qtune.check_data(recipe), qtune.make_plan(recipe)
import bitsandbytes, kernels
kernels.get_kernel()
"""
    assert python(code, tmp_path, PYTHONPATH=f"{ROOT}:{tmp_path}") == "fetched\n"  # the host's own


def test_a_recipe_is_made_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    tables = {"model": {"base": "demo"}, "data": {"train": "rows.jsonl"}, "lora": {"targets": ["q_proj"]}}
    recipe = qtune.make_recipe(name="my", **tables)
    assert recipe.data.train == str(tmp_path / "rows.jsonl")
    assert recipe.lora.targets == ("q_proj",)
    with pytest.raises(qtune.RecipeError) as refused:
        qtune.make_recipe(name="my", **tables, train={"epohcs": 2, "learning_rate": "high"})
    assert refused.value.faults == (
        'recipe: train.learning_rate must be a number, and is "high".',
        "recipe: train.epohcs is not a setting. Did you mean epochs?",
    )


@pytest.mark.parametrize("name", ["medical", "support", "style", "code", "tools"])
@pytest.mark.parametrize("demo", [True, False])
def test_a_recipe_as_a_file_says_the_same(name: str, demo: bool, tmp_path: Path) -> None:
    recipe = qtune.load_recipe(name, {"train.epochs": 2, "data.system": 'Say "yes"\n\\'}, demo)
    (tmp_path / "again.toml").write_text(load.as_toml(load.bare(recipe)), encoding="utf-8")
    again = load.load(tmp_path / "again.toml")
    assert again == load.bare(recipe)
    left_out = {"data": {"subset", "held_out_fraction"}, "demo": True}  # which have no effect on the demo's files
    assert again.model_dump(exclude=left_out) == recipe.model_dump(exclude=left_out)


def test_what_a_demo_makes_idle_is_left_out(tmp_path: Path) -> None:
    """A revision of the hub's base has no effect on the demo's, and would be refused when the run goes on."""
    (tmp_path / "rows.jsonl").write_text("{}\n")
    text = 'name = "t"\n[model]\nbase = "a/b"\nrevision = "main"\n[data]\ntrain = "rows.jsonl"\n'
    (tmp_path / "t.toml").write_text(f'{text}[demo.data]\ntrain = "rows.jsonl"\n[demo.train]\nepochs = 1\n')
    again = load.bare(qtune.load_recipe(tmp_path / "t.toml", demo=True))
    assert again.model.model_dump(exclude_unset=True) == {"base": "demo"}
    assert load.bare(again) == again


def test_a_finished_run_is_read(finished: Path) -> None:
    run = qtune.open_run(finished)
    written = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    steps = {event["step"]: event["loss"] for event in written if event["event"] == "step"}
    assert run.state == "finished"
    assert run.losses == steps
    assert list(run.losses) == list(range(1, len(steps) + 1))
    assert run.scores == json.loads((finished / "scores.json").read_text())
    assert [set(sample) >= {"prompt", "base", "tuned"} for sample in run.samples] == [True, True]
    frame = run.frame()
    assert frame["loss"].to_dict() == steps
    assert frame["held_out_loss"].dropna().to_dict() == run.held_out_losses
    assert repr(run) == f"Run({str(finished)!r}, finished)"
    assert "held-out" in run._repr_markdown_()


def test_a_run_is_scored_and_merged(finished: Path, tmp_path: Path) -> None:
    from stopped_runs import copy

    run = qtune.open_run(copy(finished, tmp_path / "run"))
    assert len(run.evaluate(rows=2, samples=1)["samples"]) == 1
    assert run.merge(tmp_path / "merged", onto="dequantised").passed
    assert (tmp_path / "merged" / "config.json").is_file()


def test_refusals_are_qtunes_own(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(qtune.RunFolderError, match="is no run folder"):
        qtune.open_run(tmp_path)
    with pytest.raises(qtune.UserError, match="metric must be one of "):
        qtune.open_run(finished).evaluate(metric="bleu")
    with pytest.raises(qtune.UserError, match=r"8 gigs"):
        qtune.make_plan(qtune.load_recipe("medical", demo=True), "8 gigs")
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(qtune.MachineError, match=r"^Run\.frame: needs pandas"):
        qtune.open_run(finished).frame()


SHORT = {
    "train.max_steps": 4,
    "train.epochs": 4,
    "train.eval_every": 4,
    "data.max_rows": 40,
    "evaluate.rows": 2,
    "evaluate.max_new_tokens": 4,
}
AS_ALWAYS = """
import bitsandbytes, datasets, os, peft, signal, transformers, trl
import qtune
from qtune.events import CheckpointSaved, Finished, StepDone

recipe = qtune.load_recipe("medical", {**SHORT, "evaluate.general": "none"}, demo=True)
before = state()
whole = qtune.finetune(recipe, "whole")
hold(before, state())

import made_once  # the plans of the others are the same
made_once.install()
before = state()
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a program trained, stopped and went on with the demo, in every way that the library has."""
    folder = tmp_path_factory.mktemp("trained")
    code = f"""{UNCHANGED}
SHORT = {SHORT}
gc.unfreeze()  # what the process it is forked from froze, some of which goes
{AS_ALWAYS}
training = qtune.Training(recipe, "looped")
for event in training:
    if isinstance(event, StepDone) and event.step == 2:
        training.stop()
assert training.run.state == "stopped", training.run
hold(before, state())

for event in qtune.Training(recipe, "left"):
    if isinstance(event, StepDone):
        break
hold(before, state())

training = qtune.Training(recipe, "interrupted")
for event in training:
    if isinstance(event, StepDone) and event.step == 1:
        os.kill(os.getpid(), signal.SIGINT)
hold(before, state())

heard = []
def interrupt(event):
    heard.append(event)
    if isinstance(event, StepDone) and event.step == 1:
        os.kill(os.getpid(), signal.SIGINT)
called = qtune.finetune(recipe, "called", interrupt)
assert called.state == "stopped" and isinstance(heard[-2], Finished), heard[-2:]
hold(before, state())

again = training.run.resume(on_event=heard.append)
assert (again.state, again.losses) == ("finished", whole.losses), (again.losses, whole.losses)
hold(before, state())
"""
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support'}"}
    ended = forked.run(["-c", code], folder, {**os.environ, **paths, "HOME": str(folder)})
    assert ended.returncode == 0, ended.stderr
    (folder / "printed.txt").write_text(ended.stdout)
    return folder


def test_a_training_prints_a_line_each(trained: Path) -> None:
    printed = (trained / "printed.txt").read_text().splitlines()
    steps = [line.split("  ")[0] for line in printed if "tok/s" in line]
    assert steps == [f"step {n}/4" for n in range(1, 5)]  # of the one that was not listened to


def test_a_training_that_is_stopped_or_left_is_a_stopped_run(trained: Path) -> None:
    for name in ("looped", "left", "called"):
        run = qtune.open_run(trained / name)
        assert run.state == "stopped"
        assert (run.path / "adapter" / "adapter_model.safetensors").is_file()
        assert 1 <= max(run.losses) < 4
        assert run.losses == {
            step: loss for step, loss in qtune.open_run(trained / "whole").losses.items() if step in run.losses
        }
        assert run.scores is None


def test_what_the_libraries_say_is_in_the_runs_log(trained: Path) -> None:
    assert "WARNING py.warnings" in (trained / "whole" / "log.txt").read_text()


def test_the_command_line_goes_on_with_what_the_library_began(trained: Path, tmp_path: Path) -> None:
    from stopped_runs import copy
    from stopped_runs import qtune as command

    run = copy(trained / "looped", tmp_path / "run")
    assert command("resume", run) == 0
    assert qtune.open_run(run).losses == qtune.open_run(trained / "whole").losses


def test_what_training_raises_comes_out_of_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.jsonl").write_text("not a row\n")
    monkeypatch.chdir(tmp_path)
    recipe = qtune.make_recipe(name="my", model={"base": "demo"}, data={"train": "rows.jsonl"})
    training = qtune.Training(recipe)
    with pytest.raises(qtune.DataError, match=r"rows\.jsonl:1: "):
        list(training)
    with pytest.raises(qtune.UserError, match="before"):
        training.run  # noqa: B018
    with pytest.raises(qtune.DataError, match=r"rows\.jsonl:1: "):
        qtune.finetune(recipe)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "work").touch()
    with pytest.raises(qtune.RunFolderError, match="is not empty"):
        qtune.finetune(recipe, "used")
