"""How an answer is scored, from 0 to 1: a file a metric. Who adds a file with a `Metric` in it has added one.

What is imported here and at the top of these files must be light: the recipe's schema and the reports read them.
"""

import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from qtune.registry import registered


class Asked(Protocol):
    """What a metric sees of a row: what was asked and the reference as written, and what the row's column of
    `data.columns.check` holds."""

    @property
    def prompt_text(self) -> str: ...

    @property
    def answer(self) -> str: ...

    @property
    def check(self) -> str: ...


@dataclass(frozen=True)
class Marks:
    """How one answer did, 0 to 1; `parts` names what the score is made of, where it is made of something."""

    score: float
    parts: dict[str, float] = field(default_factory=dict)


class Label(NamedTuple):
    """What a score is called where a person reads it: `name` is what it counts, `means` when an answer counts, as a
    clause; `means` may be empty."""

    name: str
    means: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.means})" if self.means else self.name


FaultOf = Callable[[Asked], str | None]
"""Why no answer to a row could be scored, as a clause such as `has no tests`; None where one could."""


@dataclass(frozen=True)
class Metric:
    """One way to score answers.

    `name` is what a recipe calls it, and `use` ends the sentence that begins with that name in the settings. `marks`
    scores an answer to a row. `fault_of` is for metrics that want more of a row than a reference.
    """

    name: str
    use: str
    label: Label
    marks: Callable[[str, Asked], Marks]
    fault_of: FaultOf | None = None
    order: int = 100  # of the settings' sentence; one of which nothing is said comes last


def mean_parts(marks: Sequence[Marks]) -> dict[str, float]:
    """The mean of each part over the answers that have it; a part may be for some rows only."""
    names = dict.fromkeys(name for mark in marks for name in mark.parts)
    values = {name: [mark.parts[name] for mark in marks if name in mark.parts] for name in names}
    return {name: sum(parts) / len(parts) for name, parts in values.items()}


def says_the_same(one: str, other: str) -> bool:
    return normalise(one) == normalise(other)


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and extra spaces (SQuAD's rule)."""
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def label(metric: str) -> Label:
    """That of a metric of another version is its name."""
    return METRICS[metric].label if metric in METRICS else Label(metric)


METRICS = registered(__name__, Metric)
