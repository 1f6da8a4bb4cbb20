"""Right answers, and rightful abstentions."""

import pytest

from qtune.data.rows import Example
from qtune.evaluate.metrics import Marks, mean_parts
from qtune.evaluate.metrics.abstention import abstains, abstention

RIGHT, ABSTAINED = {"answered right": 1.0, "abstained wrongly": 0.0}, {"answered right": 0.0, "abstained wrongly": 1.0}


def asked(reference: str) -> Example:
    return Example([1, 2], [-100, 2], [1], "Which class of drug is it?", reference, "rows.jsonl:1")


@pytest.mark.parametrize(
    ("answer", "reference", "marks"),
    [
        ("Statin.", "statin", Marks(1.0, RIGHT)),
        ("beta blocker", "statin", Marks(0.0, {"answered right": 0.0, "abstained wrongly": 0.0})),
        ("I do not know.", "statin", Marks(0.0, ABSTAINED)),
        ("I do not know.", "I do not know.", Marks(1.0, {"abstained rightly": 1.0})),
        ("I don't know which class it is.", "I do not know.", Marks(1.0, {"abstained rightly": 1.0})),
        ("Statin.", "I do not know.", Marks(0.0, {"abstained rightly": 0.0})),
        ("", "I do not know.", Marks(0.0, {"abstained rightly": 0.0})),
    ],
)
def test_what_an_answer_scores(answer: str, reference: str, marks: Marks) -> None:
    assert abstention(answer, asked(reference)) == marks


@pytest.mark.parametrize("text", ["Not known", "UNKNOWN.", "I don’t know", "i do  not know: the stem is new"])
def test_what_is_an_abstention(text: str) -> None:
    assert abstains(text)


@pytest.mark.parametrize("text", ["", "I know", "a statin, I do not know which", "unknown primary tumour", "known"])
def test_what_is_none(text: str) -> None:
    assert not abstains(text)


def test_abstaining_from_everything_shows_in_the_parts() -> None:
    references = ["statin", "beta blocker", "triptan", "I do not know."]
    marks = [abstention("I do not know.", asked(reference)) for reference in references]
    assert mean_parts(marks) == {"answered right": 0.0, "abstained wrongly": 1.0, "abstained rightly": 1.0}
    assert sum(mark.score for mark in marks) == 1.0
