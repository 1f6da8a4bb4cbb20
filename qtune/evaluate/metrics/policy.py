"""Support replies: does the answer give the rule that applies, in the form that is asked for?

A held-out row's check says so, in words and not in patterns, as whoever writes replies can:

    {"policy": "refund", "must": ["Order 4171", "Next step:"], "must_not": ["voucher"]}

`policy` is the wording of the rule (or a list, of which one must occur), `must` are wordings that occur in this order,
`must_not` wordings that do not occur. A wording occurs where its words stand together as whole words, whatever their
case and the white space between them. There are no patterns to get wrong, and none that could take for ever.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

from qtune.evaluate.metrics import Asked, Label, Marks, Metric

KEYS = ("policy", "must", "must_not")
EXAMPLE = '{"policy": "refund", "must": ["Next step:"], "must_not": ["voucher"]}'


class BadCheck(Exception):
    """A check that cannot be read; the message is a clause such as `has no check`."""


@dataclass(frozen=True)
class Check:
    """What one answer must say."""

    policy: tuple[str, ...]
    must: tuple[str, ...] = ()
    must_not: tuple[str, ...] = ()

    @classmethod
    def of(cls, text: str) -> "Check":
        """Raises BadCheck for what is not an object with a policy and lists of wordings."""
        if not text.strip():
            raise BadCheck(f"has no check: name its column in data.columns.check, with rows such as {EXAMPLE}")
        try:
            values = json.loads(text)
        except (json.JSONDecodeError, RecursionError):
            raise BadCheck(f"the check is not JSON such as {EXAMPLE}") from None
        if not isinstance(values, dict):
            raise BadCheck(f"the check is not an object such as {EXAMPLE}")
        strange = [key for key in values if key not in KEYS]
        if strange:
            raise BadCheck(f'the check has the key "{strange[0]}"; it may have {", ".join(KEYS)}')
        if not values.get("policy"):
            raise BadCheck("the check has no policy, the wording of the rule that applies")
        return cls(**{key: _wordings(key, value) for key, value in values.items()})

    def names_policy(self, answer: str) -> bool:
        """Whether the answer has a wording of the policy, and none that it must not have."""
        return _has_one_of(answer, self.policy) and not _has_one_of(answer, self.must_not)

    def missing(self, answer: str) -> str | None:
        """The first wording of `must` that is not there, or not behind those before it."""
        start = 0
        for wording in self.must:
            found = _pattern(wording).search(answer, start)
            if found is None:
                return wording
            start = found.end()
        return None


def policy(answer: str, asked: Asked) -> Marks:
    """1 where the answer names the row's policy and has the row's form, else 0; each is a part of its own."""
    check = Check.of(asked.check)
    named, formed = check.names_policy(answer), check.missing(answer) is None
    return Marks(float(named and formed), {"policy": float(named), "format": float(formed)})


def fault_of(asked: Asked) -> str | None:
    """What is wrong with a row's check: it cannot be read, or not even the row's own reference passes it."""
    try:
        check = Check.of(asked.check)
    except BadCheck as bad:
        return str(bad)
    missing = check.missing(asked.answer)
    if missing is not None:
        return f'its own reference does not pass the check: "{missing}" is not in it, or not in the order of `must`'
    if not check.names_policy(asked.answer):
        return "its own reference does not pass the check: it lacks the policy, or has a wording of `must_not`"
    return None


def _wordings(key: str, value: object) -> tuple[str, ...]:
    wordings = [value] if isinstance(value, str) else value
    if not isinstance(wordings, list) or not all(isinstance(each, str) and each.strip() for each in wordings):
        raise BadCheck(f'"{key}" of the check is neither a text nor a list of texts')
    return tuple(wordings)


def _has_one_of(answer: str, wordings: Iterable[str]) -> bool:
    return any(_pattern(wording).search(answer) for wording in wordings)


def _pattern(wording: str) -> re.Pattern[str]:
    r"""The words as written, each behind any white space; matched in linear time, as nothing but `\s+` repeats."""
    words = r"\s+".join(map(re.escape, wording.split()))
    before = r"(?<!\w)" if wording.split()[0][0].isalnum() else ""
    behind = r"(?!\w)" if wording.split()[-1][-1].isalnum() else ""
    return re.compile(before + words + behind, re.IGNORECASE)


METRIC = Metric(
    name="policy",
    use="for replies held against columns.check",
    label=Label("right replies", "the rule that applies, in the form asked for"),
    marks=policy,
    fault_of=fault_of,
    order=4,
)
