"""What every metric gives, and how texts are made alike before they are compared."""

import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from qtune.data.tokenize import Example


@dataclass(frozen=True)
class Marks:
    """How one answer did, 0 to 1; `parts` names what the score is made of, where it is made of something."""

    score: float
    parts: dict[str, float] = field(default_factory=dict)


Metric = Callable[[str, Example], Marks]


def mean_parts(marks: Sequence[Marks]) -> dict[str, float]:
    """The mean of each part over the answers that have it; a part may be for some rows only."""
    names = dict.fromkeys(name for mark in marks for name in mark.parts)
    values = {name: [mark.parts[name] for mark in marks if name in mark.parts] for name in names}
    return {name: sum(found) / len(found) for name, found in values.items()}


def says_the_same(one: str, other: str) -> bool:
    return normalise(one) == normalise(other)


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and extra spaces (SQuAD's rule)."""
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())
