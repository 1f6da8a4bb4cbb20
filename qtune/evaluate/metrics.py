"""How an answer is scored, from 0 to 1, and how sure a mean of scores is."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

import numpy

RESAMPLES = 10_000
RESAMPLES_AT_ONCE = 1 << 20  # row numbers drawn in one go: 8 MiB of them


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
    values, rng = numpy.asarray(scores, dtype=numpy.float64), numpy.random.default_rng(0)
    most = max(1, RESAMPLES_AT_ONCE // len(values))
    sizes = [min(most, RESAMPLES - done) for done in range(0, RESAMPLES, most)]
    means = [values[rng.integers(len(values), size=(size, len(values)))].mean(axis=1) for size in sizes]
    low, high = numpy.quantile(numpy.concatenate(means), (0.025, 0.975))
    return float(low), float(high)


def paired_interval(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """A 95 % interval of how much the mean rises, the same rows scored `before` and `after`.

    Rows are resampled with both of their scores (paired bootstrap, Efron and Tibshirani 1993), so that rows which are
    easy or hard for both do not widen it.
    """
    return interval([b - a for a, b in zip(before, after, strict=True)])
