"""Before and after: base and tuned on the same held-out rows, scored and set side by side."""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy

from qtune.data.formats.thoughts import parted
from qtune.data.rows import Example
from qtune.distributed.ranks import ALONE, Ranks
from qtune.evaluate.generate import answer
from qtune.evaluate.held_out import HeldOut, scored_examples
from qtune.evaluate.held_out_loss import held_out_loss, losses_by_source
from qtune.evaluate.held_out_pairs import PairLogs, loss_and_pairs
from qtune.evaluate.metrics import METRICS, mean_parts
from qtune.events import Listener, Notice, Scored
from qtune.memory.oom_recovery import Recovery
from qtune.model.loaded import Loaded
from qtune.recipe.schema import Evaluate
from qtune.units import counted

RESAMPLES = 10_000
RESAMPLES_AT_ONCE = 1 << 20  # row numbers drawn in one go: 8 MiB of them


@dataclass(frozen=True)
class Score:
    """One model's result; `scores` and `answers` are empty where no metric was asked for.

    `parts` are the means of what the metric's score is made of, by name; `general_loss` is that over text which has
    nothing to do with the task, `by_source` those over the held-out rows of each of several sources. `pairs` are the
    held-out rows where they are preferences.
    """

    who: str
    loss: float
    answers: tuple[str, ...]
    scores: tuple[float, ...]
    seconds: float
    parts: dict[str, float] = field(default_factory=dict)
    general_loss: float | None = None
    pairs: tuple[PairLogs, ...] = ()
    by_source: dict[str, float] = field(default_factory=dict)

    @property
    def mean(self) -> float | None:
        return sum(self.scores) / len(self.scores) if self.scores else None

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Score":
        pairs = tuple(PairLogs(*each) for each in values.get("pairs", ()))
        return cls(**{**values, "answers": tuple(values["answers"]), "scores": tuple(values["scores"]), "pairs": pairs})

    @property
    def preferred(self) -> tuple[float, ...]:
        """Of every pair whether the chosen answer is the likelier one."""
        return tuple(pair.is_preferred for pair in self.pairs)

    def event(self, metric: str) -> Scored:
        preferred = sum(self.preferred) / len(self.pairs) if self.pairs else None
        return Scored(
            self.who, self.loss, metric, self.mean, len(self.scores), self.seconds, self.general_loss, preferred
        )

    def figures(self) -> dict[str, Any]:
        low, high = interval(self.scores) if self.scores else (None, None)
        return {
            "held_out_loss": self.loss,
            "general_loss": self.general_loss,
            "by_source": self.by_source,
            "score": self.mean,
            "low": low,
            "high": high,
            "parts": self.parts,
            **({"preferred": self._preferences()} if self.pairs else {}),
        }

    def _preferences(self) -> dict[str, float]:
        """In what share of pairs the chosen answer is the likelier one, and by how many nats a token, as a mean."""
        low, high = interval(self.preferred)
        margin = sum(pair.margin for pair in self.pairs) / len(self.pairs)
        return {"score": sum(self.preferred) / len(self.pairs), "low": low, "high": high, "margin": margin}


class Measured(NamedTuple):
    """The loss of all held-out rows; of each of several sources, by name; and what was made of pairs."""

    loss: float
    by_source: dict[str, float]
    pairs: tuple[PairLogs, ...] = ()


def measured(loaded: Loaded, held_out: HeldOut, recovery: Recovery | None = None, ranks: Ranks = ALONE) -> Measured:
    """Raises OutOfMemory as `held_out_loss`. Losses of pairs are not told by source."""
    if held_out.learned.learns_pairs:
        every = loss_and_pairs(loaded, held_out.packs, held_out.learned, recovery, ranks, held_out.base)
        return Measured(every[0], {}, every[1])
    return Measured(*losses_by_source(loaded, held_out.packs, held_out.sources, recovery, ranks))


def score(
    who: str,
    loaded: Loaded,
    held_out: HeldOut,
    wanted: Evaluate,
    recovery: Recovery | None = None,
    ranks: Ranks = ALONE,
) -> Score:
    """The loss over all held-out rows and over general text, and the metric over the first `wanted.rows` that ask
    something. Of several ranks each has its share of the rows, and all know the whole result.

    Raises OutOfMemory where one row alone does not fit and `recovery` has nothing left to give up.
    """
    start = time.monotonic()
    of_rows = measured(loaded, held_out, recovery, ranks)
    general = held_out_loss(loaded, held_out.general, recovery, ranks) if held_out.general else None
    asked = scored_examples(held_out, wanted)
    prompts = ranks.share([example.prompt_ids for example in asked])
    answers = ranks.in_order(answer(loaded, prompts, held_out.stop_token_ids, wanted.max_new_tokens))
    score = marked(who, of_rows.loss, general, answers, asked, wanted.metric, time.monotonic() - start)
    return replace(score, pairs=of_rows.pairs, by_source=of_rows.by_source)


def score_told(
    who: str,
    loaded: Loaded,
    held_out: HeldOut,
    wanted: Evaluate,
    recovery: Recovery,
    listen: Listener,
    ranks: Ranks = ALONE,
) -> Score | None:
    """The same, told before and after; None where there are no held-out rows."""
    if not held_out.packs:
        return None
    listen(Notice(f"scoring the {who} model: {_scored_on(held_out, wanted)}"))
    result = score(who, loaded, held_out, wanted, recovery, ranks)
    listen(result.event(wanted.metric))
    return result


def _scored_on(held_out: HeldOut, wanted: Evaluate) -> str:
    """What is asked of each model: `loss of 20 held-out rows, 4 of them answered`."""
    rows, asked = len(held_out.examples), len(scored_examples(held_out, wanted))
    answered = f", {asked:,} of them answered" if asked < rows else ", all of them answered"
    return f"loss of {counted(rows, 'held-out row')}{answered if asked else ''}"


def marked(
    who: str,
    loss: float,
    general: float | None,
    answers: Sequence[str],
    asked: Sequence[Example],
    metric: str,
    seconds: float,
) -> Score:
    """The score of answers to `asked`, by the metric of that name; thoughts before them are not scored."""
    chosen = METRICS.get(metric)
    pairs = [(parted(a)[1], replace(e, answer=parted(e.answer)[1])) for a, e in zip(answers, asked, strict=True)]
    marks = [chosen.marks(*pair) for pair in pairs] if chosen else []
    scores = tuple(mark.score for mark in marks)
    return Score(who, loss, tuple(answers), scores, seconds, mean_parts(marks), general)


def compare(
    base: Score, tuned: Score, held_out: HeldOut, wanted: Evaluate, seed: int, others: Sequence[Score] = ()
) -> dict[str, Any]:
    """What scores.json holds: `figures_of` both, what lies between them, and by name the `others` of the same rows.

    `worst` are the rows on which the tuned model scored lowest, as many as there are samples, none that scored 1.
    `same_answers` is how many of another's answers are the tuned model's to the letter.
    """
    scores = (base, tuned, *others)
    return {
        **figures_of(scores, held_out, wanted, seed),
        "worst": _shown(scores, scored_examples(held_out, wanted), worst_rows(tuned.scores, wanted.samples, seed)),
        "difference": difference(base.scores, tuned.scores),
        **({"preferred_difference": difference(base.preferred, tuned.preferred)} if tuned.pairs else {}),
        "same_answers": {each.who: sum(map(str.__eq__, each.answers, tuned.answers)) for each in others},
    }


def figures_of(found: Sequence[Score], held_out: HeldOut, wanted: Evaluate, seed: int) -> dict[str, Any]:
    """Figures of models that were asked the same rows, every row's score, and sample answers.

    `seed` chooses the samples, so that nobody does.
    """
    asked = scored_examples(held_out, wanted)
    picked = sorted(random.Random(seed).sample(range(len(asked)), min(wanted.samples, len(asked))))
    return {
        "metric": wanted.metric,
        "rows": len(asked),
        **{each.who: each.figures() for each in found},
        **{f"{each.who}_scores": list(each.scores) for each in found},
        "samples_seed": seed,
        "samples": _shown(found, asked, picked),
    }


def worst_rows(scores: Sequence[float], most: int, seed: int) -> list[int]:
    """The rows with the lowest scores below 1, lowest first; `seed` chooses among equals, so that nobody does."""
    rows = [row for row, score in enumerate(scores) if score < 1]
    random.Random(seed).shuffle(rows)
    return sorted(rows, key=lambda row: scores[row])[:most]


def _shown(found: Sequence[Score], asked: Sequence[Example], rows: Sequence[int]) -> list[dict[str, Any]]:
    """Question, reference, and every model's answer and score, of these rows."""
    return [
        {
            "place": asked[i].place,
            "prompt": asked[i].prompt_text,
            "reference": asked[i].answer,
            **{each.who: each.answers[i] for each in found},
            **{f"{each.who}_score": each.scores[i] for each in found},
        }
        for i in rows
    ]


def difference(base: Sequence[float], tuned: Sequence[float]) -> dict[str, float] | None:
    """How much the mean score rose from base to tuned on the same rows, with its interval; None without scores."""
    if not base:
        return None
    low, high = paired_interval(base, tuned)
    return {"score": sum(tuned) / len(tuned) - sum(base) / len(base), "low": low, "high": high}


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
