"""Numbers and events in the words a person uses, and text from outside made safe to print."""

import math
import unicodedata
from collections.abc import Callable

from qtune.evaluate.metrics import label
from qtune.events import (
    Answered,
    CheckpointSaved,
    Evaluated,
    Event,
    Finished,
    Memorised,
    Notice,
    RanksStanding,
    Rehearsed,
    Resumed,
    Saved,
    Scored,
    Started,
    Stopping,
)
from qtune.units import counted, format_bytes, format_percent, format_seconds

BRIEF_CHARACTERS = 60
LEAST_WAITED_SECONDS = 0.1  # chosen: below it nobody would do anything about it

# Zero-width and direction marks: nothing is seen of them, and a model learns them all the same. The joiners U+200C
# and U+200D stay as they are, since scripts and emoji need them.
UNSEEN = frozenset("\u00ad\u061c\u200b\u200e\u200f\u2060\ufeff\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def visible(text: str) -> str:
    """`text` with control characters as pictures (ESC is ␛) and unseen marks as `\\u202e`; line feeds are kept."""
    return "".join(char if char == "\n" else _visible_char(char) for char in text)


def cut_told(texts: int, pieces: int) -> list[str]:
    """A sentence on texts longer than a sequence; none where there was none."""
    return [f"{counted(texts, 'text')} cut into {counted(pieces, 'piece')}; nothing of it is lost."] if pieces else []


def one_line(text: str) -> str:
    """`visible`, on one line: a line feed becomes `↵`."""
    return visible(text).replace("\n", "↵ ").rstrip()


def _visible_char(char: str) -> str:
    code = ord(char)
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "␡"
    if char in UNSEEN or unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp"):
        return f"\\u{code:04x}"
    return char


def finite(form: Callable[[float], str], value: float) -> str:
    """`value` through `form`; `nan` and `inf` as they are, since no unit suits them."""
    return form(value) if math.isfinite(value) else f"{value}"


def format_loss(loss: float) -> str:
    """Nats per token: `1.310`, and `2.1e+04` for one that has run away."""
    return f"{loss:.3f}" if abs(loss) < 1000 else f"{loss:.2g}"


def format_norm(norm: float) -> str:
    """A gradient norm: `0.42`, `13.7`, `2.1e+04`, two or three figures of it."""
    return f"{norm:.2f}" if 0.01 <= abs(norm) < 10 or norm == 0 else f"{norm:.3g}"


def format_score(score: float | None) -> str:
    """A score between 0 and 1, or a dash where none was asked for."""
    return "–" if score is None else f"{score:.3f}"


def format_duration(seconds: float) -> str:
    """As `format_seconds` where seconds matter, whole minutes beyond five: a forecast is no more exact than that."""
    return f"{seconds / 60:.0f} min" if 300 <= seconds < 3570 else format_seconds(seconds)


def sentence(event: Event, earlier: tuple[Evaluated, ...], steps: int) -> str | None:
    """What happened, in plain words; None for events that are drawn. `earlier` are the held-out losses so far, and
    `steps` is how many the run was to take."""
    match event:
        case Started():
            held_out = f", {event.held_out_rows:,} held out" if event.held_out_rows else ", none held out"
            return f"training on {counted(event.train_rows, 'sequence')}{held_out}"
        case Evaluated():
            return _held_out_sentence(event, earlier)
        case Answered():
            return _answers_sentence(event)
        case Rehearsed():
            return _rehearsal_sentence(event)
        case Scored():
            return _score_sentence(event)
        case Memorised():
            return f"canaries: {canaries_told(event)} ({finite(format_seconds, event.memorised_seconds)})"
        case Saved():
            took = finite(format_seconds, event.save_seconds)
            return f"{one_line(event.what)} saved ({format_bytes(event.bytes)}, {took})"
        case CheckpointSaved():
            took = finite(format_seconds, event.save_seconds)
            return f"checkpoint of step {event.step:,} saved ({format_bytes(event.bytes)}, {took})"
        case Resumed() | Notice():
            return one_line(event.text)
        case Finished():
            took = finite(format_seconds, event.train_seconds)
            stopped, done = stopped_at(event, steps), done_at(event, steps)
            if done:
                return f"{done} ({took})"
            return f"{stopped} after {took}" if stopped else f"{counted(event.steps, 'step')} done in {took}"
        case Stopping():
            if event.drops:
                return "dropping this step, then saving the one before"
            return f"finishing this step, then saving; {event.by} again drops it"
    return None


def stopped_at(event: Finished, steps: int) -> str | None:
    """`stopped at step 7 of 15`; None for a run that is done."""
    is_stopped = event.steps < steps and not event.without_better
    return f"stopped at step {event.steps:,} of {steps:,}" if is_stopped else None


def done_at(event: Finished, steps: int) -> str | None:
    """`done at step 7 of 15, with no better held-out loss in 3`; None for a run that was not done early."""
    told = f"done at step {event.steps:,} of {steps:,}, with no better held-out loss in {event.without_better:,}"
    return told if event.without_better else None


def _held_out_sentence(event: Evaluated, earlier: tuple[Evaluated, ...]) -> str:
    now = format_loss(event.loss)
    each = ", ".join(f"{one_line(name)} {format_loss(loss)}" for name, loss in event.by_source)
    of_each = f" ({each})" if each else ""
    if not earlier:
        return f"held-out {now}{of_each}"
    change = f"held-out {format_loss(earlier[-1].loss)} → {now}"
    if event.is_best:
        return f"{change}, best so far{of_each}"
    best = best_held_out(earlier)
    return (f"{change}, best was {format_loss(best.loss)} at step {best.step:,}" if best else change) + of_each


def _answers_sentence(event: Answered) -> str:
    """`answers: "who are you?" → "a model"; ... (1.2 s)`, each cut to what a line has room for."""
    pairs = zip(event.prompts, event.answers, strict=True)
    told = "; ".join(f'"{brief(asked)}" → "{brief(said)}"' for asked, said in pairs)
    return f"answers: {told} ({finite(format_seconds, event.answer_seconds)})"


def brief(text: str) -> str:
    """On one line, and no longer than a sentence has room for."""
    line = one_line(text)
    return line if len(line) <= BRIEF_CHARACTERS else f"{line[: BRIEF_CHARACTERS - 1]}…"


def _rehearsal_sentence(event: Rehearsed) -> str:
    """`the largest batch takes 1.0 GiB, forecast 1.0 GiB (0.4 % less)`, and what was switched on for it."""
    told = (
        f"the largest batch takes {format_bytes(event.measured_bytes)}, forecast {format_bytes(event.forecast_bytes)}"
    )
    if event.climbed:
        return f"{told}; switched on for it: {'; '.join(event.climbed)}"
    off = event.measured_bytes / max(1, event.forecast_bytes) - 1
    return f"{told} ({format_percent(abs(off))} {'more' if off > 0 else 'less'})"


def _score_sentence(event: Scored) -> str:
    figures = []
    if event.loss is not None:
        figures.append(f"held-out {format_loss(event.loss)}")
    if event.preferred is not None:
        figures.append(f"chosen preferred in {format_percent(event.preferred)} of pairs")
    if event.score is not None:
        figures.append(f"{label(event.metric).name} {format_score(event.score)} on {counted(event.rows, 'row')}")
    if event.general_loss is not None:
        figures.append(f"general text {format_loss(event.general_loss)}")
    return f"{event.who}: {', '.join(figures) or 'no score asked for'} ({finite(format_seconds, event.score_seconds)})"


def canaries_told(event: Memorised) -> str:
    """`3 of 10 planted in 4 rows each were told, 0 of 10 never planted; exposure 5.2 against 1.4 of 7 bits`."""
    return (
        f"{event.told:,} of {counted(event.canaries, 'secret')} planted in {counted(event.repeats, 'row')} each were"
        f" told, {event.control_told:,} of"
        f" {event.canaries:,} never planted; exposure {event.exposure_bits:.1f} against"
        f" {event.control_exposure_bits:.1f} of {event.most_exposure_bits:.0f} bits"
    )


def best_held_out(losses: tuple[Evaluated, ...]) -> Evaluated | None:
    """The lowest finite held-out loss; the earliest of equals."""
    return min((each for each in losses if math.isfinite(each.loss)), key=lambda each: each.loss, default=None)


def by_rank(standing: RanksStanding) -> list[str]:
    """`820 MiB`, and of a rank that stood waiting for others `790 MiB waited 1.2 s`."""
    told = []
    for peak, seconds in zip(standing.peak_bytes, standing.waited_seconds, strict=True):
        waited = f" waited {format_seconds(seconds)}" if seconds >= LEAST_WAITED_SECONDS else ""
        told.append(f"{format_bytes(peak)}{waited}")
    return told
