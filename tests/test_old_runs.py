"""A run folder that an older version wrote opens: it is told, talked to, scored, merged and gone on with.

`old_runs/` holds what each wrote: three steps on 40 rows of the `style` demo, LoRA of rank 1, its log left out.
"""

import hashlib
import importlib.metadata
import json
import shutil
from pathlib import Path

import pytest
from stopped_runs import qtune

ROOT = Path(__file__).resolve().parent.parent
WRITTEN_IN = "/home/user/qtune"  # stands in the folders for the checkout that made them
OLD_RUNS = sorted((ROOT / "tests/old_runs").iterdir())


@pytest.fixture(params=OLD_RUNS, ids=lambda folder: folder.name)
def old_run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy, as if it had been made in this checkout."""
    run = tmp_path / "old"
    shutil.copytree(request.param, run)
    for path in (path for path in run.rglob("*.json") if WRITTEN_IN in path.read_text(encoding="utf-8")):
        path.write_text(path.read_text(encoding="utf-8").replace(WRITTEN_IN, str(ROOT)), encoding="utf-8")
    for sums in run.rglob("SHA256SUMS"):
        names = [line.split("  ", 1)[1] for line in sums.read_text(encoding="utf-8").splitlines()]
        lines = [f"{hashlib.sha256((sums.parent / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
        sums.write_text("".join(lines), encoding="utf-8")
    return run


def allowed(run: Path) -> list[str]:
    """What has to be allowed where other versions of the libraries are installed than those that wrote the run."""
    then = json.loads((run / "lock.json").read_text(encoding="utf-8"))["versions"]
    moved = [name for name in then if importlib.metadata.version(name) != then[name]]
    return [word for name in moved for word in ("--allow-change", f"versions.{name}")]


def test_it_is_told_and_listed(old_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert qtune("report", old_run, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["steps"], round(told["loss"], 4)) == (3, 5.639)
    assert qtune("ls", old_run.parent) == 0
    assert "finished, 3 steps" in capsys.readouterr().out


def test_it_is_scored_and_merged(old_run: Path, tmp_path: Path) -> None:
    assert qtune("eval", old_run, "--rows", "2") == 0
    assert qtune("merge", old_run, "--output", tmp_path / "merged") == 0


def test_it_is_gone_on_with(old_run: Path) -> None:
    longer = ("--set", "train.max_steps=5", "--allow-change", "train.max_steps")
    assert qtune("resume", old_run, *longer, *allowed(old_run)) == 0
    events = [json.loads(line) for line in (old_run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert max(event.get("step", 0) for event in events) == 5
