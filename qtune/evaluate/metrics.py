"""How an answer is scored, from 0 to 1, and how sure a mean of scores is."""

import random
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

RESAMPLES = 1000


def exact_match(answer: str, reference: str) -> float:
    """1 where both say the same after normalising, else 0."""
    return float(normalise(answer) == normalise(reference))


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of word precision and recall (Rajpurkar et al. 2016, SQuAD); two empty texts agree."""
    given, wanted = normalise(answer).split(), normalise(reference).split()
    if not given or not wanted:
        return float(given == wanted)
    shared = sum((Counter(given) & Counter(wanted)).values())
    return 2 * shared / (len(given) + len(wanted))


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and extra spaces (SQuAD's rule)."""
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


METRICS: dict[str, Callable[[str, str], float]] = {"exact_match": exact_match, "token_f1": token_f1}


def interval(scores: Sequence[float]) -> tuple[float, float]:
    """A 95 % percentile-bootstrap interval of the mean (Efron 1979); always the same for the same scores."""
    rng = random.Random(0)
    means = sorted(sum(rng.choices(scores, k=len(scores))) / len(scores) for _ in range(RESAMPLES))
    return means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES) - 1]
