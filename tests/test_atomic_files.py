"""Folders that are whole or not there, and that know when a byte in them has changed."""

import errno
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qtune import atomic_files
from qtune.errors import DiskFull


def sealed_folder(path: Path) -> Path:
    with atomic_files.filled_in_place(path) as stage:
        (stage / "inner").mkdir()
        (stage / "inner" / "weights").write_bytes(b"weights")
        (stage / "state.json").write_text("{}")
        atomic_files.seal(stage)
    return path


def test_a_folder_takes_its_place_when_it_is_full(tmp_path: Path) -> None:
    with atomic_files.filled_in_place(tmp_path / "new" / "folder") as stage:
        (stage / "file").write_text("x")
        assert not (tmp_path / "new" / "folder").exists()
    assert (tmp_path / "new" / "folder" / "file").read_text() == "x"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["folder"]


def test_it_takes_the_place_of_one_that_is_there(tmp_path: Path) -> None:
    sealed_folder(tmp_path / "folder")
    with atomic_files.filled_in_place(tmp_path / "folder") as stage:
        (stage / "other").write_text("x")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["other"]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def fill_and_raise(path: Path, fault: BaseException) -> None:
    with atomic_files.filled_in_place(path) as stage:
        (stage / "other").write_text("x")
        raise fault


@pytest.mark.parametrize("fault", [ValueError("no"), KeyboardInterrupt(), SystemExit(143)])
def test_what_goes_wrong_leaves_what_was_there(tmp_path: Path, fault: BaseException) -> None:
    sealed_folder(tmp_path / "folder")
    with pytest.raises(type(fault)):
        fill_and_raise(tmp_path / "folder", fault)
    assert atomic_files.what_is_broken(tmp_path / "folder") is None
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_rename_that_fails_puts_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sealed_folder(tmp_path / "folder")
    rename, calls = os.rename, []

    def fail_second(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_second)
    with pytest.raises(DiskFull), atomic_files.filled_in_place(tmp_path / "folder"):
        pass
    assert atomic_files.what_is_broken(tmp_path / "folder") is None


def test_the_sums_are_those_of_sha256sum(tmp_path: Path) -> None:
    folder = sealed_folder(tmp_path / "folder")
    checked = subprocess.run(["sha256sum", "--check", atomic_files.SUMS], cwd=folder, capture_output=True, check=False)
    assert checked.returncode == 0
    assert checked.stdout.decode().split() == ["inner/weights:", "OK", "state.json:", "OK"]


def write(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (write("state.json", b"{ }"), "state.json was changed after it was written"),
        (write("inner/weights", b"weightt"), "inner/weights was changed after it was written"),
        (write("inner/weights", b""), "inner/weights was changed after it was written"),
        (lambda folder: (folder / "inner" / "weights").unlink(), "inner/weights is missing"),
        (write("optimizer.pt", b"x"), "optimizer.pt was added after it was written"),
        (lambda folder: (folder / atomic_files.SUMS).unlink(), "it has no SHA256SUMS"),
        (write(atomic_files.SUMS, b""), "inner/weights was added after it was written"),
        (write(atomic_files.SUMS, b"\xff\xfe\n"), "inner/weights was added after it was written"),
        (
            lambda folder: (folder / atomic_files.SUMS).write_bytes((folder / atomic_files.SUMS).read_bytes() + b"\n"),
            "SHA256SUMS was changed after it was written",
        ),
    ],
)
def test_every_change_is_named(tmp_path: Path, change, words: str) -> None:
    folder = sealed_folder(tmp_path / "folder")
    assert atomic_files.what_is_broken(folder) is None
    change(folder)
    assert atomic_files.what_is_broken(folder) == words


def test_a_name_that_is_no_text_is_a_file_like_any_other(tmp_path: Path) -> None:
    """One that was added ended in a UnicodeEncodeError."""
    name = b"\xff\xfe".decode(errors="surrogateescape")
    folder = sealed_folder(tmp_path / "folder")
    (folder / name).write_bytes(b"x")
    assert atomic_files.what_is_broken(folder) == r"\xff\xfe was added after it was written"
    atomic_files.seal(folder)
    assert atomic_files.what_is_broken(folder) is None


@pytest.mark.parametrize("number", atomic_files.FULL)
def test_a_full_disk_is_said_in_one_sentence(tmp_path: Path, number: int) -> None:
    with pytest.raises(DiskFull, match=r"folder: cannot be written, the disk is full\. Free some space"):
        fill_and_raise(tmp_path / "folder", OSError(number, os.strerror(number)))
    assert list(tmp_path.iterdir()) == []


def test_any_other_fault_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), atomic_files.refusing_full_disk(tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied")


def test_a_full_disk_is_known_when_safetensors_tells_of_it(tmp_path: Path, file_size_limit) -> None:
    """Its errors come from Rust and have no errno; other versions spell them otherwise."""
    file_size_limit(1000)
    with pytest.raises(DiskFull), atomic_files.refusing_full_disk(tmp_path / "x"):
        save_file({"x": torch.zeros(1000)}, tmp_path / "x")


# Two runs that were started into one folder at once both found it empty, and one took the other's place.
def test_a_folder_that_holds_something_by_then_is_not_replaced(tmp_path: Path) -> None:
    filling = atomic_files.filled_in_place(tmp_path / "run", replaces=False)
    (filling.__enter__() / "mine").write_text("late")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "theirs").write_text("first")
    with pytest.raises(OSError, match="not empty"):
        filling.__exit__(None, None, None)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["theirs"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_glance_takes_in_both_ends_and_what_lies_between(tmp_path: Path) -> None:
    """A file whose end was written anew was taken for the old one by a glance that stopped short of it."""
    path, whole = tmp_path / "weights", bytes(atomic_files.GLANCES * atomic_files.GLANCE_BYTES * 3)
    path.write_bytes(whole)
    before = atomic_files.glance_at(path)
    for place in (0, len(whole) - atomic_files.GLANCE_BYTES, len(whole) - 1):
        changed = bytearray(whole)
        changed[place] = 1
        path.write_bytes(changed)
        assert atomic_files.glance_at(path) != before
    for length in (len(whole) - 1, len(whole) + 1, 10, 0):
        path.write_bytes(bytes(length))
        assert atomic_files.glance_at(path) != before
    path.write_bytes(whole)
    assert atomic_files.glance_at(path) == before
