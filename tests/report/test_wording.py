import math

import pytest

from qtune.events import (
    Answered,
    Evaluated,
    Finished,
    MemoryMeasured,
    Notice,
    Rehearsed,
    Saved,
    Scored,
    Started,
    Stopping,
)
from qtune.report.wording import best_held_out, format_duration, format_loss, one_line, sentence, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain\ntext", "plain\ntext"),
        ("\x1b[31mred\x07", "␛[31mred␇"),
        ("a\tb\r\x7f", "a␉b␍␡"),
        ("\u202egnp.exe\ufeff", "\\u202egnp.exe\\ufeff"),
        ("half an emoji \ud83d", "half an emoji \\ud83d"),
        ("a\u2028b\x85c", "a\\u2028b\\u0085c"),
        ("👩\u200d🔬 می\u200cخواهم", "👩\u200d🔬 می\u200cخواهم"),
    ],
)
def test_nothing_unseen_reaches_the_terminal(text: str, shown: str) -> None:
    assert visible(text) == shown
    assert shown.encode("utf-8")


def test_one_line_is_one_line() -> None:
    assert one_line("asked\nanswered\n") == "asked↵ answered↵"


@pytest.mark.parametrize(
    ("event", "said"),
    [
        (Started(282, 2_850, 150), "training on 2,850 sequences, 150 held out"),
        (Started(282, 12, 0), "training on 12 sequences, none held out"),
        (Evaluated(56, 1.31, True, 4.0), "held-out 1.420 → 1.310, best so far"),
        (Evaluated(56, 1.51, False, 4.0), "held-out 1.420 → 1.510, best was 1.420 at step 28"),
        (Saved("adapter", 2_202_010, 0.1), "adapter saved (2.1 MiB, 0.1 s)"),
        (
            Scored("base", 2.113, "token_f1", 0.181, 100, 41.2),
            "base: held-out 2.113, shared words 0.181 on 100 rows (41 s)",
        ),
        (
            Scored("tuned", 1.246, "none", None, 0, 2.0, 3.6204),
            "tuned: held-out 1.246, general text 3.620 (2.0 s)",
        ),
        (Scored("tuned", 1.3, "none", None, 0, 2.0), "tuned: held-out 1.300 (2.0 s)"),
        (
            Rehearsed(2_000_000_000, 2_100_000_000, "forward", ()),
            "the largest batch takes 2.0 GiB, forecast 1.9 GiB (5.0 % more)",
        ),
        (
            Rehearsed(2_000_000_000, 1_900_000_000, "forward", ()),
            "the largest batch takes 1.8 GiB, forecast 1.9 GiB (5.0 % less)",
        ),
        (
            Rehearsed(2_000_000_000, 1_900_000_000, "forward", ("recompute layers", "tiles")),
            "the largest batch takes 1.8 GiB, forecast 1.9 GiB; switched on for it: recompute layers; tiles",
        ),
        (Notice("[bold]loading\x1b"), "[bold]loading␛"),
        (Finished(282, 1_104.0), "282 steps done in 18 min 24 s"),
        (Finished(7, 61.0), "stopped at step 7 of 282 after 1 min 01 s"),
        (Finished(7, 61.0, 3), "done at step 7 of 282, with no better held-out loss in 3 (1 min 01 s)"),
        (
            Answered(7, ("who\nare you?", "x" * 80), ("a model", ""), 0.5),
            f'answers: "who↵ are you?" → "a model"; "{"x" * 59}…" → "" (0.5 s)',
        ),
        (Stopping("Ctrl-C", drops=False), "finishing this step, then saving; Ctrl-C again drops it"),
        (Stopping("Ctrl-C", drops=True), "dropping this step, then saving the one before"),
        (Started(1, 1, 0), "training on 1 sequence, none held out"),
        (MemoryMeasured(1, (), 0, 0, 0), None),
    ],
)
def test_events_in_plain_words(event: object, said: str | None) -> None:
    assert sentence(event, (Evaluated(28, 1.42, True, 4.0),), 282) == said  # type: ignore[arg-type]


def test_a_run_of_one_step_has_no_steps() -> None:
    assert sentence(Finished(1, 2.0), (), 1) == "1 step done in 2.0 s"


def test_a_first_held_out_loss_has_nothing_to_be_better_than() -> None:
    assert sentence(Evaluated(28, 1.42, True, 4.0), (), 282) == "held-out 1.420"


def test_best_held_out_is_the_earliest_of_the_lowest_that_are_numbers() -> None:
    losses = tuple(Evaluated(step, loss, False, 1.0) for step, loss in enumerate((math.nan, 1.2, 1.1, 1.1, -math.inf)))
    best = best_held_out(losses)
    assert best is not None
    assert best.step == 2
    assert best_held_out(losses[:1]) is None


def test_numbers_stay_short() -> None:
    assert [format_loss(loss) for loss in (1.31, 0.0, 21_000.0, math.nan)] == ["1.310", "0.000", "2.1e+04", "nan"]
    assert [format_duration(s) for s in (42, 299, 1_390, 7_500)] == ["42 s", "4 min 59 s", "23 min", "2 h 05 min"]
