"""Scores a person can check."""

import pytest

from qtune.data.tokenize import Example
from qtune.errors import DataError
from qtune.evaluate import metrics
from qtune.evaluate.metric import Marks, mean_parts
from qtune.evaluate.metrics import exact_match, refuse_unscorable, token_f1


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
    monkeypatch.setitem(metrics.FAULTS, "exact_match", lambda row: None if row.answer == "good" else "has no tests")
    refuse_unscorable("exact_match", [asked("good")] * 3)
    refuse_unscorable("token_f1", [asked("bad")])
    with pytest.raises(DataError) as refused:
        refuse_unscorable("exact_match", [asked("good"), *[asked("bad")] * 5])
    assert str(refused.value).splitlines() == [
        *["rows.jsonl:1: has no tests."] * 3,
        '5 of 6 held-out rows cannot be scored by evaluate.metric = "exact_match".',
    ]
