"""How sure a mean of scores is."""

from collections.abc import Sequence

import numpy

RESAMPLES = 10_000
RESAMPLES_AT_ONCE = 1 << 20  # row numbers drawn in one go: 8 MiB of them


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
