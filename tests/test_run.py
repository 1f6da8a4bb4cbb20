"""What is left of a run that cannot start, and of one that cannot go on."""

from pathlib import Path

import pytest

from qtune.errors import ModelError
from qtune.run import _leaving_no_folder
from qtune.rundir import RunDir


@pytest.mark.parametrize("has_begun", [False, True])
def test_what_must_be_put_right_first_leaves_no_new_folder_and_takes_no_old_one(
    has_begun: bool, tmp_path: Path
) -> None:
    """A run that goes on has hours of training in its folder."""
    run = RunDir.create(tmp_path / "run", 'name = "t"\n', {})
    if has_begun:
        run.checkpoints.mkdir()
    with pytest.raises(ModelError, match="mend it"), _leaving_no_folder(run):
        raise ModelError("mend it")
    assert run.path.exists() is has_begun


def test_what_is_no_mistake_of_the_users_leaves_everything(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", 'name = "t"\n', {})
    with pytest.raises(KeyboardInterrupt), _leaving_no_folder(run):
        raise KeyboardInterrupt
    assert run.recipe.read_text() == 'name = "t"\n'
