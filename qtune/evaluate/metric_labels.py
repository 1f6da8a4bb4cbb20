"""What a metric's score is called where a person reads it; on its own, so that a report need not load the metrics."""

from typing import NamedTuple


class Label(NamedTuple):
    """`name` is what a score counts, `means` when an answer counts, as a clause; `means` may be empty."""

    name: str
    means: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.means})" if self.means else self.name


LABELS = {
    "exact_match": Label("right answers", "the reference, but for case, punctuation and articles"),
    "token_f1": Label("shared words", "F1 of the words that answer and reference share"),
    "abstention": Label("right answers", "right, or rightly abstained"),
    "policy": Label("right replies", "the rule that applies, in the form asked for"),
    "code_tests": Label("working programs", "all tests of their row pass"),
    "style": Label("style reached", "the share of the way from the prompt's wording to the reference's"),
}


def label(metric: str) -> Label:
    """That of a metric of another version is its name."""
    return LABELS.get(metric, Label(metric))
