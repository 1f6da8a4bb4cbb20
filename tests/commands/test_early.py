"""What the command line and a run's JSON tell is refused before anything heavy is imported."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from made_events import LOCK
from made_runs import make_run

from qtune import cli
from qtune.errors import ModelError, RunFolderError
from qtune.merge.merge import merge
from qtune.model.open_model import model_of
from qtune.rundir import RunDir, read_json, refuse_used, write_json
from qtune.share.servers import servers

RECIPE = 'name = "t"\n[model]\nbase = "demo"\n[data]\ntrain = "rows.jsonl"\n'


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A folder with a finished run whose base was moved to `moved`; beside it another base, a recipe and odd things."""
    place = tmp_path_factory.mktemp("early")
    shutil.copytree(tiny_base, place / "base")
    run = make_run(place / "run", place / "base")
    write_json(run.lock, {**read_json(run.lock), "name": "clinic"})
    (place / "base").rename(place / "moved")
    shutil.copytree(tiny_base, place / "other")
    weights = bytearray((place / "other" / "model.safetensors").read_bytes())
    (place / "other" / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    (place / "my.toml").write_text(RECIPE)
    (place / "rows.jsonl").write_text("{}\n")
    (place / "used").mkdir()
    (place / "used" / "work").write_text("precious")
    (place / "x.gguf").write_bytes(b"GGUF")
    return place


REFUSED = {
    "run --output used": (["run", "my.toml", "--output", "used"], "used: exists already and is not empty."),
    "run --output below a file": (["run", "my.toml", "--output", "x.gguf/a"], "x.gguf/a: cannot be made in "),
    "merge --output used": (["merge", "run", "--output", "used"], "used: exists already and is not empty."),
    "export --output used": (["export", "run", "--output", "used"], "used: exists already and is not empty."),
    "eval without lm-eval": (["eval", "run", "--tasks", "arc_easy"], "--tasks: needs lm-eval, which is not installed"),
    "eval of no tasks": (["eval", "run", "--task-folder", "no"], "--task-folder: has no effect without --tasks."),
    "eval of nothing": (["eval", "run", "--merged", "nothing"], "--merged nothing: there is no such folder or file."),
    "eval of no model": (["eval", "run", "--merged", "used"], "--merged used: used holds no model"),
    "eval of a gguf": (["eval", "run", "--merged", "x.gguf"], "x.gguf: needs llama-cpp-python, which is not installed"),
    "a picture of nowhere": (["data", "check", "my.toml", "--plot", "no/x.png"], "--plot: there is no folder no."),
    "a base of no run": (["doctor", "--base", "moved"], "--base: has no effect without --run."),
    "a moved base": (["chat", "run"], "run: its base is not in "),
    "a base that is none": (["merge", "run", "--output", "new", "--base", "used"], "--base: "),
    "a base that is another": (["export", "run", "--base", "other"], "other: is not the base of run"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_before_torch(name: str, place: Path) -> None:
    """Most of these came after the imports, some after minutes of reading, planning or scoring."""
    arguments, words = REFUSED[name]
    code = (
        "import sys; from qtune import cli; from qtune.commands import arguments;"
        " from qtune.evaluate import benchmarks;"
        " arguments.find_spec = benchmarks.find_spec = lambda name: None;"
        f" status = cli.main({arguments!r}); sys.exit(status if 'torch' not in sys.modules else 99)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=place)
    assert result.returncode == 2, result.stderr
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""


def test_a_moved_base_is_taken_from_where_it_is(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There was no way to merge, export or chat with a run whose base had been moved."""
    monkeypatch.chdir(place)
    run = RunDir.open(shutil.copytree(place / "run", tmp_path / "run"))
    lock = run.lock.read_text()
    told = {server.name: server.adapter for server in servers(run)}
    assert told["vLLM"].is_taken is None  # it printed a command with the folder that is gone
    with pytest.raises(ModelError, match="there is no folder"):
        merge(run, tmp_path / "merged", "dequantised")
    moved = RunDir.open(run.path, Path("moved"))
    assert model_of(moved).base == str(place / "moved")
    assert merge(moved, tmp_path / "merged", "dequantised").tensors > 0
    assert run.lock.read_text() == lock


def test_a_run_without_an_adapter_says_how_to_go_on(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = RunDir.open(shutil.copytree(place / "run", tmp_path / "run"))
    shutil.rmtree(run.adapter)
    assert cli.main(["chat", str(run.path)]) == 2
    assert capsys.readouterr().err.startswith(f"{run.path}: has no adapter yet. Go on with it: qtune resume ")


def test_resuming_with_a_moved_base_says_what_mends_it(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    text = RECIPE.replace('"demo"', '"./base"')
    began = {"recipe_folder": str(tmp_path), "overrides": [], "demo": False}
    run = RunDir.create(tmp_path / "run", text, began)
    mends_it = f"qtune resume {run.path} --set model.base=FOLDER --allow-change model.base"
    assert cli.main(["resume", str(run.path)]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"{run.recipe}:3: model.base: there is no folder base in {tmp_path}."
    assert second.endswith(mends_it)
    # A base that the recipe calls models/base was looked for on the hub once the folder was gone.
    write_json(run.lock, {**LOCK, "model": {"base": str(tmp_path / "models/base")}})
    assert cli.main(["resume", str(run.path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"{run.path}: its base is not in {tmp_path / 'models' / 'base'} any more.")
    assert said.rstrip().endswith(mends_it)


def test_a_folder_that_is_empty_or_new_may_be_used(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new", "a/b/c"):
        refuse_used(tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(RunFolderError, match="nothing may be written there"):
        refuse_used(tmp_path / "locked" / "run")


def test_targets_are_looked_for_before_the_rows_are_read(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("not a row\n")
    (tmp_path / "my.toml").write_text(f'{RECIPE}[lora]\ntargets = ["q_prj", "v_proj"]\n')
    assert cli.main(["check", "my.toml"]) == 2
    assert capsys.readouterr().err.startswith(
        "my.toml:7: lora.targets: no linear layer is named 'q_prj'. Did you mean q_proj? This base has down_proj, "
    )


def test_the_disk_is_looked_at_before_the_base_is_loaded(tmp_path: Path, monkeypatch, capsys) -> None:
    from qtune.model import base

    monkeypatch.chdir(tmp_path)
    row = json.dumps({"question": "Which class of drug is captopril?", "answer": "ACE inhibitor"}) + "\n"
    (tmp_path / "rows.jsonl").write_text(row * 10)
    (tmp_path / "my.toml").write_text(f"{RECIPE}held_out_fraction = 0.2\n")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    monkeypatch.setattr(base, "load_base", lambda *_: pytest.fail("the base was loaded first"))
    assert cli.main(["run", "my.toml", "--output", "out"]) == 2
    assert "of disk and 1 B are free" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
