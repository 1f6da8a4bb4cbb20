"""Style: how far an answer has come from the plain text towards the target, without a model to judge it.

A text's profile is how often each run of three characters occurs in it (Cavnar and Trenkle 1994; character n-grams are
also what tells authors apart best, Stamatatos 2009). They hold spelling, endings, function words and punctuation, and
the words that carry the meaning, so an answer that says something else is far from the target, whatever its style.
"""

import math
from collections import Counter

from qtune.evaluate.metrics import Asked, Label, Marks, Metric

RUN = 3  # characters


def profile(text: str) -> Counter[str]:
    """How often each run of RUN characters occurs; white space counts as one space, also before and behind the text."""
    words = " ".join(text.split())
    padded = f" {words} " if words else ""
    return Counter(padded[i : i + RUN] for i in range(len(padded) - RUN + 1))


def distance(one: str, other: str) -> float:
    """1 minus the cosine of the two profiles: 0 for the same text, 1 where they share nothing or one is empty."""
    if one.split() == other.split():
        return 0.0
    a, b = profile(one), profile(other)
    norm = math.sqrt(_dot(a, a) * _dot(b, b))
    return 1.0 - _dot(a, b) / norm if norm else 1.0


def style(answer: str, asked: Asked) -> Marks:
    """The share of the way from the prompt's plain text to the reference: 1 - d(answer, target) / d(plain, target).

    An answer that is the reference scores 1; one that is the prompt, or no closer to the reference than the prompt is
    (nothing, another text, a word over and over), scores 0. The plain text is the row's last question as written, so an
    instruction belongs in the system prompt. The parts are both distances, 0 to 1.
    """
    to_target, to_plain = distance(answer, asked.answer), distance(answer, asked.prompt_text)
    way = distance(asked.prompt_text, asked.answer)
    return Marks(max(0.0, 1.0 - to_target / way), {"distance to target": to_target, "distance to plain": to_plain})


def fault_of(asked: Asked) -> str | None:
    """A row whose reference is what it starts from has no way to go."""
    if distance(asked.prompt_text, asked.answer) == 0.0:
        return "the reference says what the prompt says, so there is no style to reach"
    return None


def _dot(one: Counter[str], other: Counter[str]) -> int:
    return sum(count * other[run] for run, count in one.items())


METRIC = Metric(
    name="style",
    use="for rewriting",
    label=Label("style reached", "the share of the way from the prompt's wording to the reference's"),
    marks=style,
    fault_of=fault_of,
    order=6,
)
