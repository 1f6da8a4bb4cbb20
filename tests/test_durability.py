"""Whatever is moved into place is on the disk by then, and so is its name afterwards: no power cut leaves a half."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from made_bases import make_base
from made_runs import make_run
from power_cut import Disk
from stopped_runs import copy, qtune, write_recipe

from qtune import atomic_files
from qtune.gguf import llama_cpp
from qtune.rundir import write_json


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Disk]:
    before = os.umask(0o022)
    yield Disk(monkeypatch, tmp_path)
    os.umask(before)


def names(disk: Disk) -> list[str]:
    """What was moved into place, once each; nothing of it could be lost, and others can read it."""
    assert (disk.lost, disk.private, disk.unsettled) == ([], [], [])
    return list(dict.fromkeys(path.name for path in disk.moved))


def test_what_would_be_lost_is_seen(disk: Disk, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    os.replace(tmp_path / "a", tmp_path / "b")
    assert disk.lost == disk.unsettled == [str(tmp_path / "b")]
    with (tmp_path / "c").open("w") as file:
        file.write("1")
        os.fsync(file.fileno())
        file.write("2")  # is in no memory but this process's when the file is synced
    os.rename(tmp_path / "c", tmp_path / "d")
    assert disk.lost[1:] == [str(tmp_path / "d")]
    atomic_files.flush(tmp_path)
    assert disk.unsettled == []


def test_a_sealed_folder(disk: Disk, tmp_path: Path) -> None:
    for _ in range(2):  # the second takes the place of the first
        with atomic_files.filled_in_place(tmp_path / "above" / "folder") as stage:
            (stage / "inner").mkdir()
            (stage / "inner" / "file").write_text("x")
            atomic_files.seal(stage)
    assert names(disk) == ["folder"]
    assert (tmp_path / "above" / "folder").stat().st_mode & 0o777 == 0o755


def test_a_json_file(disk: Disk, tmp_path: Path) -> None:
    for value in (1, 2):
        write_json(tmp_path / "x.json", value)
    assert names(disk) == ["x.json"]
    assert (tmp_path / "x.json").stat().st_mode & 0o777 == 0o644


def test_a_run_its_checkpoints_and_its_adapter(disk: Disk, tiny_base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_base, train={"max_steps": 4}, memory={"rehearse": False})
    assert qtune("run", recipe, "--output", tmp_path / "run") == 0
    moved = names(disk)
    assert {"run", "lock.json", "plan.json", "data.json", "step-00000002", "step-00000004", "adapter"} <= set(moved)


def test_a_merge(disk: Disk, finished: Path, tmp_path: Path) -> None:
    run = copy(finished, tmp_path / "run")
    assert qtune("merge", run, "--output", tmp_path / "merged", "--onto", "dequantised") == 0
    assert {"merged", "merge_report.json", "merge.json"} <= set(names(disk))


def test_a_gguf_file(disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path / "base", "llama tied")
    (base / "LICENSE").write_text("Do as you like.")
    run = make_run(tmp_path / "run", base, compute_dtype="float32")
    write_json(run.probe, [])
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    assert qtune("export", run.path, "--to", "ollama", "--quant", "q8_0", "--output", tmp_path / "out") == 0
    assert {"out", "export_report.json"} <= set(names(disk))
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"model.gguf", "Modelfile", "LICENSE"}
