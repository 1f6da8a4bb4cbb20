"""How an answer is scored, from 0 to 1."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from qtune.data.tokens import Example


@dataclass(frozen=True)
class Marks:
    """How one answer did, 0 to 1; `parts` names what the score is made of, where it is made of something."""

    score: float
    parts: dict[str, float] = field(default_factory=dict)


Metric = Callable[[str, Example], Marks]


def exact_match(answer: str, asked: Example) -> Marks:
    """1 where answer and reference say the same after normalising, else 0."""
    return Marks(float(normalise(answer) == normalise(asked.answer)))


def token_f1(answer: str, asked: Example) -> Marks:
    """Harmonic mean of word precision and recall (Rajpurkar et al. 2016, SQuAD); two empty texts agree."""
    given, wanted = normalise(answer).split(), normalise(asked.answer).split()
    if not given or not wanted:
        return Marks(float(given == wanted))
    shared = sum((Counter(given) & Counter(wanted)).values())
    return Marks(2 * shared / (len(given) + len(wanted)))


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and extra spaces (SQuAD's rule)."""
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


METRICS: dict[str, Metric] = {"exact_match": exact_match, "token_f1": token_f1}


def mean_parts(marks: Sequence[Marks]) -> dict[str, float]:
    """The mean of each part over the answers that have it; a part may be for some rows only."""
    names = dict.fromkeys(name for mark in marks for name in mark.parts)
    values = {name: [mark.parts[name] for mark in marks if name in mark.parts] for name in names}
    return {name: sum(found) / len(found) for name, found in values.items()}
