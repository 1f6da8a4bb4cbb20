"""Run folders of other versions of qtune: read where that is safe, and refused in one sentence where it is not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from stopped_runs import copy, plans_made_once, qtune, write_recipe

from qtune import __version__, atomic_files
from qtune.errors import RunFolderError
from qtune.rundir import RunDir, read_json, reading, write_json

SCORED = {"metric": "token_f1", "rows": 2, "max_new_tokens": 4, "samples": 1, "general": "none"}
Tables = dict[str, Any]


@pytest.fixture(scope="module")
def finished(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    recipe = write_recipe(folder, tiny_base, evaluate=SCORED, train={"max_steps": 2}, save={"every": 1})
    with plans_made_once():
        assert qtune("run", recipe, "--output", folder / "run") == 0
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> RunDir:
    return RunDir(copy(finished, tmp_path / "run"))


def edit(path: Path, change: Callable[[Tables], Any]) -> None:
    tables = read_json(path)
    change(tables)
    write_json(path, tables)


def written_by(run: RunDir, version: str | None) -> None:
    def change(lock: Tables) -> None:
        lock["versions"].pop("qtune")
        lock["versions"] |= {"qtune": version} if version else {}

    edit(run.lock, change)


def add_unknown(table: str) -> Callable[[Tables], Any]:
    return lambda tables: tables[table].update(from_the_future=1)


def test_a_run_notes_which_qtune_wrote_it(run: RunDir) -> None:
    assert run.qtune_version == __version__ == run.read_lock().versions["qtune"]
    assert RunDir(run.path / "nowhere").qtune_version is None


def test_a_plan_of_before_the_setting_of_the_head_is_answered_with(run: RunDir, capsys) -> None:
    """`quantized_head` became `head`, and every run that had been planned before ended chat in a TypeError."""

    def change(plan: Tables) -> None:
        del plan["techniques"]["head"]
        plan["techniques"]["quantized_head"] = True

    written_by(run, None)
    edit(run.plan, change)
    assert qtune("chat", run.path, "--prompt", "what is xx?", "--max-new-tokens", "2") == 0


def test_a_plan_of_before_a_technique_is_answered_without_it(run: RunDir, capsys) -> None:
    edit(run.plan, lambda plan: plan["techniques"].pop("streamed_layers"))
    assert qtune("chat", run.path, "--prompt", "what is xx?", "--max-new-tokens", "2") == 0


def test_a_setting_that_came_later_has_its_default(run: RunDir, capsys) -> None:
    written_by(run, "0.0.1")
    edit(run.lock, lambda lock: lock["recipe"].pop("report"))
    edit(run.lock, lambda lock: lock["recipe"]["memory"].pop("head"))
    assert qtune("eval", run.path, "--rows", "1") == 0
    capsys.readouterr()
    assert qtune("resume", run.path) == 2
    said = capsys.readouterr().err
    assert f'versions.qtune: was "0.0.1", is "{__version__}" (--allow-change versions.qtune)' in said
    assert "report" not in said
    assert "memory" not in said
    assert qtune("resume", run.path, "--allow-change", "versions.qtune") == 0


@pytest.mark.parametrize("writer", [None, "9.0"])
@pytest.mark.parametrize(
    ("table", "verb"),
    [
        ("model", ["chat", "--prompt", "x"]),
        ("model", ["eval"]),
        ("recipe", ["eval"]),
        ("recipe", ["resume"]),
        ("model", ["merge", "--output", "merged"]),
        ("model", ["export", "--output", "exported"]),
        ("model", ["doctor", "--run"]),
    ],
)
def test_settings_that_are_not_known_are_refused_with_who_wrote_them(
    run: RunDir, tmp_path: Path, monkeypatch, capsys, table: str, verb: list[str], writer: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    written_by(run, writer)
    edit(run.lock, add_unknown(table))
    arguments = [*verb, run.path] if verb[0] == "doctor" else [verb[0], run.path, *verb[1:]]
    capsys.readouterr()
    assert qtune(*arguments) == 2
    named = f"qtune {writer}" if writer else "a qtune that did not note its version"
    assert capsys.readouterr().err == (
        f"{run.lock}: was written by {named}, and qtune {__version__} cannot read it. Use the version that wrote it.\n"
    )


@pytest.mark.parametrize(
    ("name", "change", "verb"),
    [
        ("lock.json", lambda lock: lock.pop("stop_token_ids"), ["chat", "--prompt", "x"]),
        ("lock.json", lambda lock: lock.update(model=[]), ["eval"]),
        ("plan.json", lambda plan: plan.pop("techniques"), ["chat", "--prompt", "x"]),
        ("plan.json", lambda plan: plan.update(techniques=None), ["eval"]),
        ("base_score.json", lambda score: score.update(from_the_future=1), ["resume"]),
        ("base_score.json", lambda score: score.pop("answers"), ["resume"]),
    ],
)
def test_a_file_with_other_fields_is_named(run: RunDir, capsys, name: str, change, verb: list[str]) -> None:
    edit(run.path / name, change)
    capsys.readouterr()
    assert qtune(verb[0], run.path, *verb[1:]) == 2
    assert f"{run.path / name}: is not as qtune wrote it; it was changed since." in capsys.readouterr().err


def test_a_merge_that_says_no_base_is_named(run: RunDir, tmp_path: Path, capsys) -> None:
    write_json(run.merge, {"folded": "dequantised"})
    assert qtune("export", run.path, "--output", tmp_path / "exported") == 2
    assert f"{run.merge}: is not as qtune wrote it" in capsys.readouterr().err


@pytest.mark.parametrize("verb", [["report"], ["report", "--html"], ["report", "--json"]])
def test_a_report_on_other_fields_says_who_wrote_them(run: RunDir, capsys, verb: list[str]) -> None:
    def change(plan: Tables) -> None:
        plan["settled"] = plan.pop("choices")
        plan["needs"] = plan.pop("forecast")

    written_by(run, "9.0")
    edit(run.plan, change)
    capsys.readouterr()
    assert qtune(*verb, run.path) == 2
    assert capsys.readouterr().err.startswith(f"{run.path}: was written by qtune 9.0, and qtune {__version__} cannot")


@pytest.mark.parametrize("line", ['{"event": "from_the_future"}', '{"event": "finished", "steps": 1}', "[]", "1"])
def test_an_event_that_is_not_known_is_named(run: RunDir, capsys, line: str) -> None:
    written_by(run, "9.0")
    run.metrics.write_text(f"{line}\n{run.metrics.read_text()}")
    with pytest.raises(RunFolderError, match=rf"^{run.metrics}:1: was written by qtune 9.0, and"):
        list(run.events())
    assert qtune("report", run.path) == 0
    assert "What follows is not shown" in " ".join(capsys.readouterr().out.split())


def test_a_failure_on_a_folder_of_this_version_stays_what_it_is(run: RunDir) -> None:
    with pytest.raises(KeyError, match="choices"), reading(run):
        raise KeyError("choices")


def test_a_checkpoint_of_another_version_is_named(run: RunDir, capsys) -> None:
    """The techniques in it were unpacked as they stood."""
    newest = max(run.checkpoints.iterdir())
    state = json.loads((newest / "state.json").read_text())
    state["techniques"]["from_the_future"] = True
    (newest / "state.json").write_text(json.dumps(state))
    atomic_files.seal(newest)
    assert qtune("resume", run.path) == 2
    assert f"{newest}: was written by another version of qtune" in capsys.readouterr().err


@pytest.mark.parametrize("verb", [["chat", "--prompt", "x"], ["eval"], ["doctor", "--run"]])
def test_another_base_in_the_place_of_the_runs_is_found_at_a_glance(
    tiny_base: Path, run: RunDir, tmp_path: Path, capsys, verb: list[str]
) -> None:
    """Only merges and exports hash the base, and an answer came from whatever lay in its folder."""
    other = tmp_path / "base"
    shutil.copytree(tiny_base, other)
    edit(run.lock, lambda lock: lock["model"].update(base=str(other)))
    edit(run.lock, lambda lock: lock["recipe"]["model"].update(base=str(other)))
    edit(run.lock, lambda lock: lock["base"].update(folder=str(other)))
    arguments = [*verb, run.path] if verb[0] == "doctor" else [verb[0], run.path, *verb[1:]]
    assert qtune(*arguments) == 0
    weights = {name: weight * 1.01 for name, weight in load_file(other / "model.safetensors").items()}
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    capsys.readouterr()
    code = qtune(*arguments, *(["--json"] if verb[0] == "doctor" else []))
    said = capsys.readouterr()
    assert f"{other}: is not the base of {run.path}" in said.out + said.err
    assert code == (0 if verb[0] == "doctor" else 2)
    edit(run.lock, lambda lock: lock["base"].pop("glance_sha256"))
    assert qtune(*arguments) == 0
