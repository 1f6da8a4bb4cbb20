"""Sentences: how many words an answer shares with its reference."""

from collections import Counter

from qtune.evaluate.metrics import Asked, Label, Marks, Metric, normalise


def token_f1(answer: str, asked: Asked) -> Marks:
    """Harmonic mean of word precision and recall (Rajpurkar et al. 2016, SQuAD); two empty texts agree."""
    given, wanted = normalise(answer).split(), normalise(asked.answer).split()
    if not given or not wanted:
        return Marks(float(given == wanted))
    shared = sum((Counter(given) & Counter(wanted)).values())
    return Marks(2 * shared / (len(given) + len(wanted)))


METRIC = Metric(
    name="token_f1",
    use="for sentences",
    label=Label("shared words", "F1 of the words that answer and reference share"),
    marks=token_f1,
    order=2,
)
