"""A run folder as values, however far the run got, and what is not there said in sentences."""

from pathlib import Path

from made_events import LOCK, events_of_a_run, start_run, whole_run_in

from qtune.events import Evaluated, Finished
from qtune.report import run_record
from qtune.rundir import write_json


def test_a_whole_run_lacks_nothing(tmp_path: Path) -> None:
    found = run_record.read(whole_run_in(tmp_path))
    assert found.missing == ()
    assert found.finished is not None
    assert found.train_seconds == found.finished.train_seconds
    assert (found.stopped, len(found.steps), found.name) == (None, 282, "medical")
    assert found.best == min((e for e in events_of_a_run() if isinstance(e, Evaluated)), key=lambda e: e.loss)


def test_what_a_run_that_only_began_lacks_is_said(tmp_path: Path) -> None:
    """That training did not come to its end could be left out, and no test knew."""
    found = run_record.read(start_run(tmp_path))
    assert found.missing == (
        *(f"{name} is missing: the run did not get that far." for name in ("lock.json", "data.json", "plan.json")),
        "scores.json is missing: the run did not get that far.",
        "Training did not come to its end.",
        "No adapter was saved.",
    )
    assert (found.finished, found.train_seconds, found.tokens_per_second, found.best) == (None, None, None, None)
    assert found.recipe == 'name = "medical"\n'


def test_training_that_was_cut_off_is_told_from_training_that_ended(tmp_path: Path) -> None:
    run = start_run(tmp_path)
    write_json(run.lock, LOCK)
    for event in events_of_a_run():
        if isinstance(event, Finished):
            break
        run.record(event)
    assert "Training did not come to its end." in run_record.read(run).missing
    run.record(event)
    assert "Training did not come to its end." not in run_record.read(run).missing


def test_a_file_that_is_no_json_is_named_and_the_rest_is_read(tmp_path: Path) -> None:
    run = whole_run_in(tmp_path)
    run.scores.write_text("{")
    found = run_record.read(run)
    assert found.scores is None
    [said] = found.missing
    assert "scores.json: is not readable JSON" in said
    assert found.data is not None
