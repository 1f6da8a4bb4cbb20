"""How an answer is scored, from 0 to 1, and which rows no answer could be scored on."""

from collections import Counter
from collections.abc import Sequence

from qtune.audit.row_checks import FaultOf
from qtune.data.tokenize import Example
from qtune.errors import DataError
from qtune.evaluate import code_tests, policy, style
from qtune.evaluate.abstention import abstention
from qtune.evaluate.metric import Marks, Metric, normalise, says_the_same
from qtune.recipe.schema import Evaluate

SHOWN_ROWS = 3


def exact_match(answer: str, asked: Example) -> Marks:
    """1 where answer and reference say the same after normalising, else 0."""
    return Marks(float(says_the_same(answer, asked.answer)))


def token_f1(answer: str, asked: Example) -> Marks:
    """Harmonic mean of word precision and recall (Rajpurkar et al. 2016, SQuAD); two empty texts agree."""
    given, wanted = normalise(answer).split(), normalise(asked.answer).split()
    if not given or not wanted:
        return Marks(float(given == wanted))
    shared = sum((Counter(given) & Counter(wanted)).values())
    return Marks(2 * shared / (len(given) + len(wanted)))


METRICS: dict[str, Metric] = {
    "exact_match": exact_match,
    "token_f1": token_f1,
    "abstention": abstention,
    "policy": policy.policy,
    "code_tests": code_tests.code_tests,
    "style": style.style,
}
# What is wrong with a row, as a clause, for metrics that want more of it than a reference.
FAULTS: dict[str, FaultOf] = {
    "policy": policy.fault_of,
    "code_tests": code_tests.fault_of,
    "style": style.fault_of,
}


def refuse_unscorable(metric: str, asked: Sequence[Example]) -> None:
    """Raises DataError with the first of the rows whose answers `metric` could not score, and why not.

    Asked before anything is trained: a check that cannot be read would otherwise be found hours later.
    """
    fault_of = FAULTS.get(metric, lambda example: None)
    found = [(example.place, fault) for example in asked if (fault := fault_of(example)) is not None]
    if not found:
        return
    named = [f"{place}: {fault}." for place, fault in found[:SHOWN_ROWS]]
    count = f"{len(found):,} of {len(asked):,} held-out rows" if len(found) > 1 else "This row"
    raise DataError("\n".join([*named, f'{count} cannot be scored by evaluate.metric = "{metric}".']))


def fault_asked(wanted: Evaluate) -> FaultOf | None:
    """Why an answer to a row could not be scored, for a metric that wants more of it than a reference; None for others,
    and where no row is scored."""
    return FAULTS.get(wanted.metric) if wanted.rows else None
