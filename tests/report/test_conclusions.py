"""Did it learn, how sure is that, what did it forget: one verdict, in the same words wherever a run is told."""

import io
from pathlib import Path
from typing import Any

import pytest
from made_events import DATA, SCORES, start_run, whole_run_in
from rich.console import Console, RenderableType

from qtune.report import conclusions, html_page, model_card, run_record, summary, tables
from qtune.rundir import RunDir, write_json


def scored(base: float | None, tuned: float | None, low: float = 0.0, high: float = 0.0, **more: Any) -> dict[str, Any]:
    """scores.json of a run whose right answers went from `base` to `tuned`."""
    figures = {who: {**SCORES[who], "score": value} for who, value in (("base", base), ("tuned", tuned))}
    rise = None if base is None or tuned is None else {"score": tuned - base, "low": low, "high": high}
    return {**SCORES, **figures, "metric": "abstention", "difference": rise, **more}


def told(folder: Path, scores: dict[str, Any], data: dict[str, Any] = DATA) -> tuple[conclusions.Conclusion, ...]:
    run = whole_run_in(folder)
    write_json(run.scores, scores)
    write_json(run.data, data)
    return conclusions.conclusions_of(run_record.read(run))


ANSWERS = "right answers (right, or rightly abstained)"


@pytest.mark.parametrize(
    ("scores", "text", "is_good"),
    [
        (
            scored(0.4, 0.9, 0.45, 0.55),
            f"It learned: {ANSWERS} went from 0.400 to 0.900 on 100 held-out rows, a difference between +0.450 and"
            " +0.550 with 95 % confidence.",
            True,
        ),
        (
            scored(0.4, 0.42, -0.01, 0.05),
            f"Whether it learned cannot be said: {ANSWERS} went from 0.400 to 0.420 on 100 held-out rows, a difference"
            " between -0.010 and +0.050 with 95 % confidence, which may be chance.",
            None,
        ),
        (
            scored(0.4, 0.42, 0.0, 0.05),
            f"Whether it learned cannot be said: {ANSWERS} went from 0.400 to 0.420 on 100 held-out rows, a difference"
            " between +0.000 and +0.050 with 95 % confidence, which may be chance.",
            None,
        ),
        (
            scored(0.4, 0.38, -0.05, 0.0),
            f"Whether it learned cannot be said: {ANSWERS} went from 0.400 to 0.380 on 100 held-out rows, a difference"
            " between -0.050 and +0.000 with 95 % confidence, which may be chance.",
            None,
        ),
        (
            scored(0.4, 0.2, -0.3, -0.1),
            f"It got worse: {ANSWERS} went from 0.400 to 0.200 on 100 held-out rows, a difference between -0.300 and"
            " -0.100 with 95 % confidence.",
            False,
        ),
        (
            scored(0.0, 1.0, 1.0, 1.0),
            f"It learned: {ANSWERS} went from 0.000 to 1.000 on 100 held-out rows, and every row changed by as much.",
            True,
        ),
        (
            scored(0.4, 0.4),
            f"It did not learn: {ANSWERS} went from 0.400 to 0.400 on 100 held-out rows, and no row scored otherwise"
            " than before.",
            False,
        ),
        (
            scored(0.4, 0.9, 0.2, 0.8, rows=8),
            f"It learned: {ANSWERS} went from 0.400 to 0.900 on 8 held-out rows, a difference between +0.200 and +0.800"
            " with 95 % confidence. So few rows say little.",
            True,
        ),
        (
            scored(None, None),
            "It learned to predict the held-out rows: their loss fell from 2.113 to 1.246 nats a token. Answers were"
            " not scored.",
            True,
        ),
        (
            SCORES,
            "Shared words (F1 of the words that answer and reference share) went from 0.181 to 0.402 on 100 held-out"
            " rows; how sure that is was not measured.",
            None,
        ),
    ],
)
def test_whether_it_learned_and_how_sure_that_is(
    tmp_path: Path, scores: dict[str, Any], text: str, is_good: bool | None
) -> None:
    assert told(tmp_path, scores)[0] == (text, is_good)


def test_a_loss_that_rose_is_no_learning(tmp_path: Path) -> None:
    scores = scored(None, None)
    scores["tuned"]["held_out_loss"] = 2.2
    assert told(tmp_path, scores)[0].text.startswith("It did not learn: the loss on held-out rows went from 2.113 to")


def test_held_out_rows_that_were_trained_on_are_part_of_the_verdict(tmp_path: Path) -> None:
    """The overlap stood among the notices of the data, and the score was told as if it were none."""
    finding = told(tmp_path, scored(0.4, 0.9, 0.45, 0.55), {**DATA, "overlap_rows": 12})[0]
    assert finding.text.endswith(" But 12 held-out rows were trained on too, which flatters it.")
    assert finding.is_good is False


@pytest.mark.parametrize(
    ("before", "after", "text", "is_good"),
    [
        (
            3.0,
            4.0,
            "General text is 33 % harder for it than before (loss 3.000 before, 4.000 after): it forgets. ",
            False,
        ),
        (
            3.53,
            5.01,
            "General text is 42 % harder for it than before (loss 3.530 before, 5.010 after): it forgets. ",
            False,
        ),
        (3.0, 3.99, "General text is 33 % harder for it than before (loss 3.000 before, 3.990 after).", True),
        (3.0, 3.015, "General text is as easy for it as before (loss 3.000 before, 3.015 after).", True),
        (3.0, 2.7, "General text is 10 % easier for it than before (loss 3.000 before, 2.700 after).", True),
        (None, None, "What it forgot was not measured.", None),
    ],
)
def test_a_third_more_loss_on_general_text_is_a_warning_with_what_helps(
    tmp_path: Path, before: float | None, after: float | None, text: str, is_good: bool | None
) -> None:
    """3.53 to 5.01 was a plain row of a table."""
    scores = scored(0.4, 0.9, 0.45, 0.55)
    scores["base"]["general_loss"], scores["tuned"]["general_loss"] = before, after
    finding = told(tmp_path, scores)[1]
    assert finding == (text + (conclusions.ADVICE if is_good is False else ""), is_good)


def flat(shown: RenderableType) -> str:
    console = Console(width=80, file=io.StringIO(), color_system=None)
    with console.capture() as capture:
        console.print(shown)
    return " ".join(capture.get().split())


def places(run: RunDir) -> list[str]:
    """Everywhere that a run is told."""
    summary.write_summary(run)
    return [
        flat(summary.report(run)),
        flat(tables.end_of_run(run)),
        run.summary.read_text(encoding="utf-8"),
        html_page.run_page(run),
        model_card.card(run_record.read(run)),
    ]


def test_the_same_sentences_stand_wherever_a_run_is_told(tmp_path: Path) -> None:
    run = whole_run_in(tmp_path)
    scores = scored(0.4, 0.9, 0.45, 0.55)
    scores["base"]["general_loss"], scores["tuned"]["general_loss"] = 3.0, 4.5
    write_json(run.scores, scores)
    for finding in conclusions.conclusions_of(run_record.read(run)):
        assert [finding.text in place for place in places(run)] == [True] * 5
    assert summary.as_json(run)["verdict"] == conclusions.text(run_record.read(run))


def test_a_run_that_was_not_scored_has_no_verdict(tmp_path: Path) -> None:
    run = start_run(tmp_path)
    assert conclusions.conclusions_of(run_record.read(run)) == ()
    assert summary.as_json(run)["verdict"] is None
    assert "learn" not in flat(summary.report(run))
