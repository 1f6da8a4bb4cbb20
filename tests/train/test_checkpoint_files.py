"""Checkpoints: which one is gone on from, which are kept, and what is said of those that are broken."""

from pathlib import Path

import pytest

from qtune.errors import DiskFull, RunFolderError
from qtune.train import checkpoint_files


def write(folder: Path, *steps: int) -> list[Path]:
    return [
        checkpoint_files.write(folder, step, lambda stage: (stage / "state.json").write_text("{}")) for step in steps
    ]


def steps(folder: Path) -> list[int]:
    return [step for step, _ in checkpoint_files.steps_in(folder)]


def test_the_newest_comes_first_and_by_number(tmp_path: Path) -> None:
    write(tmp_path, 9, 100_000_000, 10)
    for name in ("step-x", "step-", "step-٣", "step-7.old", ".step-00000008.abc"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000099").write_text("a file")
    assert steps(tmp_path) == [100_000_000, 10, 9]
    assert steps(tmp_path / "nowhere") == []


def test_the_newest_whole_one_is_chosen_and_the_broken_ones_are_named(tmp_path: Path) -> None:
    oldest, *broken = write(tmp_path, 3, 6, 9, 12)
    (broken[0] / "state.json").write_text("{ }")
    (broken[1] / "state.json").unlink()
    (broken[2] / "SHA256SUMS").unlink()
    path, why = checkpoint_files.choose(tmp_path)
    assert path == oldest
    assert why == (
        "Going on from step-00000003, the newest whole checkpoint."
        " step-00000012 is passed over: it has no SHA256SUMS."
        " step-00000009 is passed over: state.json is missing."
        " step-00000006 is passed over: state.json was changed after it was written."
    )


def test_where_all_are_broken_nothing_is_gone_on_from(tmp_path: Path) -> None:
    for path in write(tmp_path, 3, 6):
        (path / "state.json").unlink()
    with pytest.raises(RunFolderError) as fault:
        checkpoint_files.choose(tmp_path)
    assert str(fault.value).startswith(f"{tmp_path}: no checkpoint is whole. step-00000006 is passed over")
    assert "step-00000003 is passed over" in str(fault.value)
    assert "qtune run" in str(fault.value)


def test_without_a_checkpoint_a_run_begins_again(tmp_path: Path) -> None:
    assert checkpoint_files.choose(tmp_path / "checkpoints") == (
        None,
        "The run was stopped before its first checkpoint, so it begins again.",
    )


def test_one_that_cannot_be_written_leaves_the_others(tmp_path: Path, file_size_limit) -> None:
    older = write(tmp_path, 3)[0]
    file_size_limit(100)
    with pytest.raises(DiskFull):
        checkpoint_files.write(tmp_path, 6, lambda stage: (stage / "state.json").write_text("x" * 101))
    assert list(tmp_path.iterdir()) == [older]
    assert checkpoint_files.newest_whole(tmp_path) == (older, [])


@pytest.mark.parametrize(
    ("keep", "newest", "best", "left"),
    [
        (1, 12, None, [12]),
        (2, 12, None, [12, 9]),
        (2, 12, 3, [12, 9, 3]),
        (2, 12, 12, [12, 9]),
        (9, 12, None, [12, 9, 6, 3]),
        (2, 6, None, [6, 3]),  # 9 and 12 are of a past that was resumed before them
        (1, 6, 12, [12, 6]),
    ],
)
def test_the_newest_and_the_best_are_kept(
    tmp_path: Path, keep: int, newest: int, best: int | None, left: list[int]
) -> None:
    paths = dict(zip((3, 6, 9, 12), write(tmp_path, 3, 6, 9, 12), strict=True))
    checkpoint_files.prune(tmp_path, paths[newest], keep, None if best is None else paths[best])
    assert steps(tmp_path) == left


def test_what_a_cut_write_left_is_removed(tmp_path: Path) -> None:
    path = write(tmp_path, 3)[0]
    for name in (".step-00000003.abcdefgh", ".step-00000003.old.abcdefgh"):
        (tmp_path / name / "adapter").mkdir(parents=True)
    checkpoint_files.prune(tmp_path, path, 2, None)
    assert list(tmp_path.iterdir()) == [path]
