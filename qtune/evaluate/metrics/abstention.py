"""Exact answers, and saying so where there is none."""

from qtune.evaluate.metrics import Asked, Label, Marks, Metric, normalise, says_the_same

NOT_KNOWN = ("not known", "unknown")  # whole answers only: an unknown primary tumour is a diagnosis
I_DO_NOT_KNOW = ("i do not know", "i dont know")  # a reason may follow


def abstains(text: str) -> bool:
    """Whether a text, normalised, is one of NOT_KNOWN or begins with one of I_DO_NOT_KNOW."""
    words = normalise(text.replace("\N{RIGHT SINGLE QUOTATION MARK}", ""))
    return words in NOT_KNOWN or f"{words} ".startswith(tuple(f"{phrase} " for phrase in I_DO_NOT_KNOW))


def abstention(answer: str, asked: Asked) -> Marks:
    """Exact match, where a reference that abstains is matched by any answer that does.

    `answered right` and `abstained wrongly` are of the rows that have an answer, `abstained rightly` of those whose
    reference abstains. Answering what has no answer and abstaining from what has one both score 0 (the two errors of
    SQuAD 2.0, Rajpurkar et al. 2018).
    """
    if abstains(asked.answer):
        rightly = float(abstains(answer))
        return Marks(rightly, {"abstained rightly": rightly})
    right = float(says_the_same(answer, asked.answer))
    return Marks(right, {"answered right": right, "abstained wrongly": float(abstains(answer))})


METRIC = Metric(
    name="abstention",
    use='where it may rightly be "I do not know"',
    label=Label("right answers", "right, or rightly abstained"),
    marks=abstention,
    order=3,
)
