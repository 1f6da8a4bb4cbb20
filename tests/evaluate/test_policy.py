"""Replies held against a check: what passes, what does not, and which checks are refused."""

import json
import time

import pytest

from qtune.data.rows import Example
from qtune.errors import DataError
from qtune.evaluate.held_out import refuse_unscorable
from qtune.evaluate.metrics.policy import fault_of, policy
from qtune.recipe.schema import Evaluate

REPLY = "Thank you for writing about order 417.\nWe refund within 30 days.\nNext step: send the parcel back."
CHECK = {"policy": ["refund", "money back"], "must": ["order 417", "Next step:"], "must_not": ["voucher"]}


def asked(check: object = CHECK, reference: str = REPLY) -> Example:
    text = check if isinstance(check, str) else json.dumps(check)
    return Example([1, 2], [-100, 2], [1], "I want to return order 417.", reference, "rows.jsonl:4", text)


@pytest.mark.parametrize(
    ("answer", "named", "formed"),
    [
        (REPLY, 1.0, 1.0),
        ("ORDER\n 417: you get your money\nback. Next step: wait.", 1.0, 1.0),
        ("Next step: wait. We refund order 417.", 1.0, 0.0),  # not in this order
        (REPLY.replace("417", "4170"), 1.0, 0.0),  # whole words only
        (REPLY.replace("refund", "exchange"), 0.0, 1.0),
        (f"{REPLY} Or take a voucher.", 0.0, 1.0),
        ("I want to return order 417.", 0.0, 0.0),
        ("refund refund refund refund", 1.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_policy_and_form_are_parts_of_their_own(answer: str, named: float, formed: float) -> None:
    marks = policy(answer, asked())
    assert marks.parts == {"policy": named, "format": formed}
    assert marks.score == named * formed


def test_a_check_may_be_a_policy_alone() -> None:
    assert policy("We refund it.", asked({"policy": "refund"})).score == 1.0
    assert policy("It is non-refundable.", asked({"policy": "refund"})).score == 0.0


@pytest.mark.parametrize(
    ("check", "fault"),
    [
        ("", "has no check: name its column in data.columns.check"),
        ("refund", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ([], "not an object"),
        ({}, "has no policy"),
        ({"policy": []}, "has no policy"),
        ({"policy": 3}, '"policy" of the check is neither a text nor a list of texts'),
        ({"policy": "refund", "must": [" "]}, '"must" of the check'),
        ({"policy": "refund", "should": []}, 'the key "should"; it may have policy, must, must_not'),
        ({"policy": "refund", "must": ["order 41"]}, '"order 41" is not in it'),
        ({"policy": "refund", "must": ["Next step", "order 417"]}, '"order 417" is not in it, or not in the order'),
        ({"policy": "exchange"}, "it lacks the policy"),
        ({"policy": "refund", "must_not": ["30 days"]}, "or has a wording of `must_not`"),
    ],
)
def test_faults_of_a_check(check: object, fault: str) -> None:
    found = fault_of(asked(check))
    assert found is not None
    assert fault in found


def test_rows_with_such_checks_are_refused_by_place() -> None:
    wanted = Evaluate(metric="policy")
    refuse_unscorable([asked()] * 2, wanted)
    with pytest.raises(DataError, match=r"^rows\.jsonl:4: the check is not JSON such as .*\nThis row cannot be scored"):
        refuse_unscorable([asked(), asked("refund")], wanted)


def test_no_wording_takes_for_ever() -> None:
    """As a pattern, (a+)+b needs longer than the universe has for this answer."""
    row = asked({"policy": "(a+)+b", "must": ["a " * 40 + "b", "(.*)*x"]})
    start = time.process_time()
    assert policy("a " * 20_000 + "a" * 20_000, row).score == 0.0
    assert time.process_time() - start < 2
