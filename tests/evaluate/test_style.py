"""The way from plain text to target."""

import pytest

from qtune.data.rows import Example
from qtune.errors import DataError
from qtune.evaluate.held_out import refuse_unscorable
from qtune.evaluate.metrics.style import distance, style
from qtune.recipe.schema import Evaluate

PLAIN = "Please be advised that the office will be closed on Monday due to the public holiday."
TARGET = "The office is closed on Monday, a public holiday."


def asked(plain: str = PLAIN, target: str = TARGET) -> Example:
    return Example([1, 2], [-100, 2], [1], plain, target, "rows.jsonl:7")


def test_the_target_scores_1_and_the_plain_text_0() -> None:
    assert style(TARGET, asked()).score == 1.0
    assert style(PLAIN, asked()).score == 0.0
    assert style(f" {TARGET}\n", asked()).score == 1.0


@pytest.mark.parametrize(
    "answer",
    ["", " ", "x", "the the the the the the", "Closed. " * 40, "A kind of plant with red flowers.", "!" * 500],
)
def test_answers_that_say_nothing_score_0(answer: str) -> None:
    assert style(answer, asked()).score == 0.0


def test_each_rule_that_is_followed_brings_it_closer() -> None:
    steps = [
        PLAIN,
        "The office will be closed on Monday due to the public holiday.",
        "The office is closed on Monday due to the public holiday.",
        TARGET,
    ]
    marks = [style(answer, asked()) for answer in steps]
    scores, to_target, to_plain = zip(
        *((mark.score, mark.parts["distance to target"], mark.parts["distance to plain"]) for mark in marks),
        strict=True,
    )
    assert sorted(scores) == list(scores)
    assert len(set(scores)) == len(scores)
    assert sorted(to_target, reverse=True) == list(to_target)
    assert to_plain[0] == to_target[-1] == 0.0


def test_the_style_without_the_meaning_is_far_off() -> None:
    other = style("The museum is open on Friday, a normal day.", asked())
    assert other.score < 0.3
    assert other.parts["distance to target"] > 0.4


def test_a_distance_by_hand() -> None:
    """Of " ab " the runs are " ab" and "ab ", of " ac " neither; " ab ab " has each of them twice, and "b a" once."""
    assert distance("ab", "ac") == 1.0
    assert distance("ab", "ab ab") == pytest.approx(1 - 4 / (2**0.5 * 9**0.5))
    assert distance("", "") == 0.0
    assert distance("", "ab") == 1.0


def test_a_reference_that_is_its_prompt_cannot_be_scored() -> None:
    with pytest.raises(DataError, match=r"^rows\.jsonl:7: the reference says what the prompt says"):
        refuse_unscorable([asked(), asked(TARGET, TARGET)], Evaluate(metric="style"))
