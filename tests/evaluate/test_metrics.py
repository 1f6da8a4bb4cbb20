"""Scores a person can check."""

import dataclasses

import pytest

from qtune.data.rows import Example
from qtune.errors import DataError
from qtune.evaluate.held_out import refuse_unscorable
from qtune.evaluate.metrics import METRICS, Label, Marks, label, mean_parts
from qtune.evaluate.metrics.exact_match import exact_match
from qtune.evaluate.metrics.token_f1 import token_f1
from qtune.recipe.schema import Evaluate


def asked(reference: str) -> Example:
    return Example([1, 2], [-100, 2], [1], "question", reference, "rows.jsonl:1")


@pytest.mark.parametrize(
    ("answer", "reference", "exact", "f1"),
    [
        ("Beta blocker.", "beta blocker", 1.0, 1.0),
        ("the statin", "Statin", 1.0, 1.0),
        ("alpha blocker", "beta blocker", 0.0, 0.5),
        ("", "statin", 0.0, 0.0),
        ("", "", 1.0, 1.0),
        ("a b c d", "c d e f", 0.0, 4 / 7),  # "a" is an article: 2 shared of 3 and 4
        ("yes yes yes", "yes", 0.0, 0.5),
    ],
)
def test_both_metrics(answer: str, reference: str, exact: float, f1: float) -> None:
    assert exact_match(answer, asked(reference)) == Marks(exact)
    assert token_f1(answer, asked(reference)).score == pytest.approx(f1)


def test_a_part_is_averaged_over_the_answers_that_have_it() -> None:
    marks = [Marks(1.0, {"a": 1.0}), Marks(0.0, {"a": 0.0, "b": 0.5}), Marks(0.0)]
    assert mean_parts(marks) == {"a": 0.5, "b": 0.5}
    assert mean_parts([]) == {}


def test_rows_that_cannot_be_scored_are_named_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    picky = dataclasses.replace(
        METRICS["exact_match"], fault_of=lambda row: None if row.answer == "good" else "has no tests"
    )
    monkeypatch.setitem(METRICS, "exact_match", picky)
    wanted = Evaluate(metric="exact_match")
    refuse_unscorable([asked("good")] * 3, wanted)
    refuse_unscorable([asked("bad")], Evaluate(metric="token_f1"))
    refuse_unscorable([asked("bad")], Evaluate(metric="none"))
    with pytest.raises(DataError) as refused:
        refuse_unscorable([asked("good"), *[asked("bad")] * 5], wanted)
    assert str(refused.value).splitlines() == [
        *["rows.jsonl:1: has no tests."] * 3,
        '5 of 6 held-out rows cannot be scored by evaluate.metric = "exact_match".',
    ]


def test_every_metric_is_called_by_what_it_means() -> None:
    """`abstention 0.898` read as if it abstained nine times in ten."""
    assert all(metric.label.name not in METRICS and metric.label.means for metric in METRICS.values())
    assert str(label("abstention")) == "right answers (right, or rightly abstained)"
    assert label("of another version") == Label("of another version")
    assert str(label("of another version")) == "of another version"
