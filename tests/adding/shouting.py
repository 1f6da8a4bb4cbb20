"""Does an answer shout as loudly as its reference? Copied into qtune/evaluate/metrics by test_a_metric."""

from qtune.evaluate.metrics import Asked, Label, Marks, Metric


def _capitals(text: str) -> int:
    return sum(letter.isupper() for letter in text)


def shouting(answer: str, asked: Asked) -> Marks:
    """The share of the reference's capitals that the answer has, at the most 1; `heard` is whether there is any."""
    loud = min(_capitals(answer), _capitals(asked.answer)) / _capitals(asked.answer)
    return Marks(loud, {"heard": float(loud > 0)})


def fault_of(asked: Asked) -> str | None:
    return None if _capitals(asked.answer) else "its reference whispers"


METRIC = Metric(
    name="shouting",
    use="for capitals",
    label=Label("loudness", "as many capitals as the reference"),
    marks=shouting,
    fault_of=fault_of,
)
