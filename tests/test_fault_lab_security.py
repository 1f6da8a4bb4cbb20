"""A small part of the fault lab's lanes on security; `scripts/fault_lab` has the rest of each."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

from fault_lab import leaked_secrets, paths, pickles, sockets, templates

from qtune.data.template_process import Untraceable


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.long)])
def test_no_pickle_is_opened(tmp_path: Path, seed: int) -> None:
    assert list(pickles.run(30, seed, tmp_path)) == [None] * 30


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.long)])
def test_no_name_leads_out_of_its_folder(tmp_path: Path, seed: int) -> None:
    assert list(paths.run(60, seed, tmp_path)) == [None] * 60


@pytest.mark.long  # the quick ones are in test_template_process
def test_templates_that_run_away_are_stopped(tmp_path: Path) -> None:
    assert list(templates.run(4, 1, tmp_path)) == [None] * 4


@pytest.mark.long  # of a whole run it is seen below
def test_no_connection_is_tried_by_any_verb(tmp_path: Path) -> None:
    assert list(sockets.run(len(sockets.VERBS), 0, tmp_path)) == [None] * len(sockets.VERBS)


def test_no_secret_is_written_and_no_connection_tried(tmp_path: Path) -> None:
    """One run, with a `kernels` package that would ask for a connection, and one crash."""
    assert list(leaked_secrets.run(2, 1, tmp_path)) == [None] * 2


def test_the_lanes_see_what_they_look_for(tmp_path: Path) -> None:
    """A lane that passes whatever happens proves nothing."""
    ended = sockets.stage.Ended(0, "", ("connect(('198.51.100.1', 443),)",))
    assert "198.51.100.1" in (sockets.judged(("check",), ended) or "")
    secrets = {"HF_TOKEN": "secret1"}
    (tmp_path / "log.txt").write_text("with secret1 in it")
    assert "198.51.100.1" in (leaked_secrets.judged(ended, tmp_path, secrets, expected=0) or "")
    done = sockets.stage.Ended(0, "", ())
    assert leaked_secrets.judged(done, tmp_path, secrets, expected=0) == "leaked: HF_TOKEN in log.txt"
    assert "came back" in (templates.judged("how", ["a", Untraceable("stopped"), Untraceable("stopped")], 0.0) or "")
    assert "was rendered" in (templates.judged("how", ["a", "bad", "b"], 0.0) or "")
