"""Scores a person can check."""

import pytest

from qtune.data.tokens import Example
from qtune.evaluate.metrics import Marks, exact_match, mean_parts, token_f1


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
