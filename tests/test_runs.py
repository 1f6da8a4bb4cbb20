"""`qtune ls` and `qtune rm`: what runs there are, and what is removed of them, which is never anything else."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from at_a_terminal import ROOT, AtTerminal
from stopped_runs import copy, qtune

from qtune.errors import RunFolderError
from qtune.rundir import RunDir


@pytest.fixture
def runs(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a finished run, one that was stopped at step 4 of 8, and one that never began."""
    monkeypatch.chdir(tmp_path)
    copy(finished, tmp_path / "runs" / "whole")
    stopped = copy(finished, tmp_path / "runs" / "nested" / "half", up_to=4)
    journal = (stopped / "metrics.jsonl").read_text().splitlines()
    end = next(i for i, line in enumerate(journal) if '"step": 5' in line)
    (stopped / "metrics.jsonl").write_text("\n".join(journal[:end]) + '\n{"event": "st')
    never = tmp_path / "runs" / "never"
    never.mkdir()
    for name in ("recipe.toml", "invocation.json"):
        (never / name).write_bytes((finished / name).read_bytes())
    (tmp_path / "runs" / "notes").mkdir()
    for age, run in enumerate((never, stopped, tmp_path / "runs" / "whole")):
        os.utime(run / "recipe.toml", (time.time() - 60 * age,) * 2)
    return tmp_path


def listed(capsys: pytest.CaptureFixture, *arguments: str | Path) -> dict[str, dict]:
    capsys.readouterr()
    assert qtune("ls", *arguments, "--json") == 0
    return {run["path"]: run for run in json.loads(capsys.readouterr().out)}


def test_who_names_no_run_is_told_the_newest_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunFolderError, match=r"^nowhere: there is no such run folder\.$"):
        RunDir.open(Path("nowhere"))
    for age in range(7):
        lock = tmp_path / "runs" / f"of-{age}-days" / "lock.json"
        lock.parent.mkdir(parents=True)
        lock.write_text("{}")
        os.utime(lock.parent, (time.time() - 86_400 * age,) * 2)
    with pytest.raises(RunFolderError) as refused:
        RunDir.open(Path("nowhere"))
    newest = ", ".join(f"runs/of-{age}-days" for age in (4, 3, 2, 1, 0))
    assert str(refused.value) == f"nowhere: there is no such run folder. Runs here: {newest}."


def test_runs_are_listed_newest_first_with_how_far_they_came(runs: Path, capsys: pytest.CaptureFixture) -> None:
    found = listed(capsys)
    assert list(found) == ["runs/never", "runs/nested/half", "runs/whole"]
    never, half, whole = found.values()
    assert (whole["state"], whole["steps_done"], whole["steps"], whole["name"]) == ("finished", 8, 8, "t")
    assert (half["state"], half["steps_done"], half["steps"]) == ("stopped", 4, 8)
    assert (never["state"], never["steps_done"], never["name"]) == ("never began", 0, None)
    scores = json.loads((runs / "runs" / "whole" / "scores.json").read_text())
    assert (whole["score"], whole["after"]) == ("token_f1", scores["tuned"]["score"])
    assert whole["adapter_bytes"] == sum(path.stat().st_size for path in (runs / "runs/whole/adapter").iterdir())
    assert 0 < whole["checkpoint_bytes"] < whole["bytes"]
    assert qtune("ls") == 0
    said = capsys.readouterr().out
    assert "runs/nested/half" in said
    assert "stopped at step 4 of 8" in said
    assert "finished, 8 steps" in said
    assert list(listed(capsys, "runs/whole")) == ["runs/whole"]


def test_where_there_is_no_run_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert qtune("ls") == 0
    assert "There is no run below runs." in capsys.readouterr().out
    assert listed(capsys) == {}
    assert qtune("ls", "nowhere") == 2


def test_listing_loads_no_torch(runs: Path) -> None:
    code = "import sys; from qtune import cli; cli.main(['ls']); sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], check=False, env=environment).returncode == 0


def test_a_run_at_work_is_told_and_left_alone(runs: Path, capsys: pytest.CaptureFixture) -> None:
    """By a lock of a live process: a lock file alone, of one that was killed, is none."""
    assert listed(capsys)["runs/whole"]["state"] == "finished"
    hold = f"from qtune.rundir import RunDir; from pathlib import Path\nwith RunDir(Path({str(runs / 'runs/whole')!r}))"
    with subprocess.Popen(
        [sys.executable, "-c", f"{hold}.held():\n  print(flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:
        process.stdout.readline()
        assert listed(capsys)["runs/whole"]["state"] == "running"
        assert qtune("rm", "runs/never", "runs/whole", "--yes") == 2
        assert "another qtune is at work on this run" in capsys.readouterr().err
        process.communicate(b"\n")
    assert (runs / "runs" / "never").is_dir()
    assert listed(capsys)["runs/whole"]["state"] == "finished"


def test_runs_are_removed_whole(runs: Path, capsys: pytest.CaptureFixture) -> None:
    assert qtune("rm", "runs/never", "runs/whole", "--yes") == 0
    assert "runs/whole  " in capsys.readouterr().out
    assert sorted(path.name for path in (runs / "runs").iterdir()) == ["nested", "notes"]


def test_a_run_that_is_named_twice_is_removed_once(runs: Path, capsys: pytest.CaptureFixture) -> None:
    size = listed(capsys)["runs/whole"]["bytes"]
    assert qtune("rm", "runs/whole", "runs/whole", "--yes", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"removed": ["runs/whole"], "bytes": size}


def test_all_steps_without_an_adapter_are_no_finished_run(runs: Path, capsys: pytest.CaptureFixture) -> None:
    (runs / "runs" / "whole" / "adapter").rename(runs / "taken")
    assert listed(capsys)["runs/whole"]["state"] == "stopped"


def test_checkpoints_alone_are_removed(runs: Path, capsys: pytest.CaptureFixture) -> None:
    before = listed(capsys)["runs/whole"]
    assert qtune("rm", "--checkpoints", "runs/whole", "--yes", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer == {"removed": ["runs/whole/checkpoints"], "bytes": before["checkpoint_bytes"]}
    after = listed(capsys)["runs/whole"]
    assert after == {**before, "checkpoint_bytes": 0, "bytes": before["bytes"] - before["checkpoint_bytes"]}
    assert RunDir.open(Path("runs/whole")).adapter.is_dir()
    assert qtune("rm", "--checkpoints", "runs/whole", "--yes") == 2
    assert "has no checkpoints" in capsys.readouterr().err
    # Without them it began again, and wrote over the adapter that was to stay.
    assert qtune("resume", "runs/whole") == 2
    assert "its checkpoints were removed, so it cannot go on" in capsys.readouterr().err


def test_nothing_else_is_removed(runs: Path, capsys: pytest.CaptureFixture) -> None:
    (runs / "link").symlink_to(runs / "runs" / "whole")
    (runs / "mine").mkdir()
    (runs / "mine" / "invocation.json").write_text("{}")
    (runs / "runs" / "never" / "out").symlink_to(runs / "mine")
    for path, words in (
        ("link", "link: is a link to"),
        ("mine", "is no run folder, it has no recipe.toml"),
        ("runs", "is no run folder"),
        ("runs/notes", "is no run folder"),
        ("runs/nowhere", "there is no such run folder"),
        ("runs/never", "out: is a link, and a run folder holds none"),
    ):
        assert qtune("rm", path, "--yes") == 2
        assert words in capsys.readouterr().err
    assert qtune("rm", "runs/whole", "link", "--yes") == 2
    assert qtune("rm", "runs/whole") == 2  # there is no terminal to ask at
    assert "Give --yes" in capsys.readouterr().err
    assert (runs / "runs" / "whole").is_dir()
    assert (runs / "mine" / "invocation.json").is_file()


@pytest.mark.parametrize(("reply", "is_gone"), [("y", True), ("n", False), ("", False)])
def test_it_asks_at_a_terminal(runs: Path, reply: str, is_gone: bool) -> None:
    terminal = AtTerminal([sys.executable, "-m", "qtune", "rm", "runs/never"], runs)
    try:
        terminal.type(f"{reply}\n")
        said = b"".join(iter(terminal.read, b"")).decode()
        assert terminal.process.wait(timeout=60) == 0
    finally:
        terminal.close()
    assert "runs/never  " in said
    assert (runs / "runs" / "never").exists() != is_gone
