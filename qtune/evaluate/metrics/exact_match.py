"""Labels and short answers: right or wrong."""

from qtune.evaluate.metrics import Asked, Label, Marks, Metric, says_the_same


def exact_match(answer: str, asked: Asked) -> Marks:
    """1 where answer and reference say the same after normalising, else 0."""
    return Marks(float(says_the_same(answer, asked.answer)))


METRIC = Metric(
    name="exact_match",
    use="for labels",
    label=Label("right answers", "the reference, but for case, punctuation and articles"),
    marks=exact_match,
    order=1,
)
