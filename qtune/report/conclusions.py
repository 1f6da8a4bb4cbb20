"""The first sentences of every report: did it learn, how sure is that, and what did it forget."""

from typing import Any, NamedTuple

from rich.text import Text

from qtune.evaluate.metrics import label
from qtune.report.run_record import Record
from qtune.report.wording import format_loss, format_score
from qtune.units import counted, format_percent

FORGETS_FROM = 1 / 3  # more loss on general text; a choice: the demos, whose small base forgets much, have 0.4 to 0.7
SAME_LOSS_NATS = 0.02  # how sure a loss over evaluate.general's 8,192 tokens is
FEW_ROWS = 20  # a percentile bootstrap over fewer is clearly too narrow (Hesterberg 2015)
ADVICE = "Fewer epochs, a lower learning rate, or ordinary text among the training rows would keep more."


class Conclusion(NamedTuple):
    """A sentence or two; `is_good` is None where the figures do not say."""

    text: str
    is_good: bool | None


def conclusions_of(found: Record) -> tuple[Conclusion, ...]:
    """What was learned, then what was forgotten; nothing for a run that was not scored."""
    if not found.scores:
        return ()
    return _learned(found.scores, (found.data or {}).get("overlap_rows", 0)), _forgotten(found.scores)


def text(found: Record) -> str:
    """The verdict as one paragraph; empty where there is none."""
    return " ".join(conclusion.text for conclusion in conclusions_of(found))


def _learned(scores: dict[str, Any], overlap: int) -> Conclusion:
    learned = _of_what_was_learned(scores)
    if not overlap:
        return learned
    trained_on = "1 held-out row was" if overlap == 1 else f"{overlap:,} held-out rows were"
    return Conclusion(f"{learned.text} But {trained_on} trained on too, which flatters it.", False)


def _of_what_was_learned(scores: dict[str, Any]) -> Conclusion:
    if scores.get("preferred_difference"):
        return _by_preference(scores)
    return _by_loss(scores) if scores["tuned"]["score"] is None else _by_score(scores)


def _by_preference(scores: dict[str, Any]) -> Conclusion:
    """In how many pairs it prefers the chosen answer, as sure as the paired interval is."""
    before, after = (format_percent(scores[who]["preferred"]["score"]) for who in ("base", "tuned"))
    change = f"the chosen answer is the likelier one in {after} of held-out pairs, before in {before}"
    low, high = scores["preferred_difference"]["low"], scores["preferred_difference"]["high"]
    sure = f"a difference between {low:+.3f} and {high:+.3f} with 95 % confidence"
    if low <= 0 <= high:
        return Conclusion(f"Whether it learned the preferences cannot be said: {change}, {sure}.", None)
    word = "It learned the preferences" if low > 0 else "It learned the opposite of the preferences"
    return Conclusion(f"{word}: {change}, {sure}.", low > 0)


def _by_loss(scores: dict[str, Any]) -> Conclusion:
    before, after = (scores[who]["held_out_loss"] for who in ("base", "tuned"))
    change = f"from {format_loss(before)} to {format_loss(after)} nats a token. Answers were not scored."
    if after < before:
        return Conclusion(f"It learned to predict the held-out rows: their loss fell {change}", True)
    return Conclusion(f"It did not learn: the loss on held-out rows went {change}", False)


def _by_score(scores: dict[str, Any]) -> Conclusion:
    """How the mean score changed, as sure as the paired interval is."""
    rows, rise = counted(scores["rows"], "held-out row"), scores.get("difference")
    before, after = (format_score(scores[who]["score"]) for who in ("base", "tuned"))
    change = f"{label(scores['metric'])} went from {before} to {after} on {rows}"
    if not rise:
        return Conclusion(f"{change[0].upper()}{change[1:]}; how sure that is was not measured.", None)
    low, high = rise["low"], rise["high"]
    few = " So few rows say little." if scores["rows"] < FEW_ROWS else ""
    if low == high:
        return _without_interval(rise["score"], change, few)
    sure = f"a difference between {low:+.3f} and {high:+.3f} with 95 % confidence"
    if low <= 0 <= high:
        return Conclusion(f"Whether it learned cannot be said: {change}, {sure}, which may be chance.{few}", None)
    word = "It learned" if low > 0 else "It got worse"
    return Conclusion(f"{word}: {change}, {sure}.{few}", low > 0)


def _without_interval(rise: float, change: str, few: str) -> Conclusion:
    """Where every row changed by as much, resampling rows says nothing of how sure that is."""
    if rise == 0:
        return Conclusion(f"It did not learn: {change}, and no row scored otherwise than before.{few}", False)
    word = "It learned" if rise > 0 else "It got worse"
    return Conclusion(f"{word}: {change}, and every row changed by as much.{few}", rise > 0)


def _forgotten(scores: dict[str, Any]) -> Conclusion:
    """How much harder text became that has nothing to do with the task."""
    before, after = (scores[who].get("general_loss") for who in ("base", "tuned"))
    if before is None or after is None:
        return Conclusion("What it forgot was not measured.", None)
    losses = f"(loss {format_loss(before)} before, {format_loss(after)} after)"
    if abs(after - before) <= SAME_LOSS_NATS:
        return Conclusion(f"General text is as easy for it as before {losses}.", True)
    share = after / before - 1
    if share < 0:
        return Conclusion(f"General text is {-100 * share:.0f} % easier for it than before {losses}.", True)
    harder = f"General text is {100 * share:.0f} % harder for it than before {losses}"
    return (
        Conclusion(f"{harder}: it forgets. {ADVICE}", False)
        if after >= (1 + FORGETS_FROM) * before
        else Conclusion(f"{harder}.", True)
    )


def lines(found: Record) -> list[Text]:
    """The verdict in the colours of good and of bad news, a line each."""
    styles = {True: "green", False: "yellow", None: ""}
    return [Text(conclusion.text, styles[conclusion.is_good]) for conclusion in conclusions_of(found)]
