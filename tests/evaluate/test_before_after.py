"""What scores.json holds: both models on the same rows, the rise between them, and samples that nobody picked."""

import json
from dataclasses import dataclass

import pytest

from qtune.evaluate.before_after import Score, compare, difference, interval, paired_interval, worst_rows
from qtune.evaluate.held_out import HeldOut
from qtune.recipe.schema import Evaluate

ROWS = 40
WANTED = Evaluate(metric="exact_match", rows=ROWS, samples=5)


@dataclass(frozen=True)
class Asked:
    """As much of an example as is asked for here."""

    prompt_text: str
    answer: str
    place: str
    prompt_ids: tuple[int, ...] = (1,)


def held_out(rows: int = ROWS) -> HeldOut:
    return HeldOut((), [Asked(f"question {i}", f"answer {i}", f"rows.jsonl:{i}") for i in range(rows)], (1,))  # type: ignore[misc]


def scored(who: str, right: int, rows: int = ROWS) -> Score:
    scores = tuple(float(i < right) for i in range(rows))
    return Score(who, 1.0, tuple(f"{who} {i}" for i in range(rows)), scores, 0.1)


def compared(seed: int = 0, wanted: Evaluate = WANTED) -> dict:
    return compare(scored("base", 4), scored("tuned", 30), held_out(), wanted, seed)


def test_every_row_keeps_its_scores_so_that_intervals_can_be_made_again() -> None:
    found = json.loads(json.dumps(compared()))
    assert interval(found["base_scores"]) == (found["base"]["low"], found["base"]["high"])
    assert interval(found["tuned_scores"]) == (found["tuned"]["low"], found["tuned"]["high"])
    low, high = paired_interval(found["base_scores"], found["tuned_scores"])
    assert found["difference"] == {"score": pytest.approx(26 / 40), "low": low, "high": high}
    assert 0 < low < 26 / 40 < high


def test_samples_are_drawn_by_the_seed_and_belong_to_their_rows() -> None:
    asked = [[sample["prompt"] for sample in compared(seed)["samples"]] for seed in (0, 0, 1)]
    assert asked[0] == asked[1] != asked[2]
    assert compared(1)["samples_seed"] == 1
    for sample in compared()["samples"]:
        row = sample["prompt"].split()[1]
        assert (sample["reference"], sample["base"], sample["tuned"]) == (
            f"answer {row}",
            f"base {row}",
            f"tuned {row}",
        )
        assert (sample["base_score"], sample["tuned_score"]) == (float(int(row) < 4), float(int(row) < 30))


@pytest.mark.parametrize(("samples", "drawn"), [(0, 0), (3, 3), (ROWS, ROWS), (100, ROWS)])
def test_no_more_samples_than_rows_and_none_twice(samples: int, drawn: int) -> None:
    found = compared(wanted=WANTED.model_copy(update={"samples": samples}))["samples"]
    assert len(found) == len({sample["prompt"] for sample in found}) == drawn


def test_the_worst_answers_are_kept_lowest_first_and_none_that_is_right() -> None:
    """Only samples were kept, so that no report could say where a run failed."""
    scores = [1.0, 0.5, 0.0, 1.0, 0.2, 0.0]
    assert sorted(worst_rows(scores, 2, 0)) == [2, 5]
    assert worst_rows(scores, 10, 0)[2:] == [4, 1]
    assert worst_rows(scores, 0, 0) == worst_rows([1.0] * 4, 3, 0) == []
    assert {worst_rows([0.0] * 9, 1, seed)[0] for seed in range(20)} > {worst_rows([0.0] * 9, 1, 0)[0]}
    found = compared()["worst"]
    assert len(found) == WANTED.samples
    for row in found:
        number = int(row["place"].removeprefix("rows.jsonl:"))
        assert (row["tuned"], row["tuned_score"]) == (f"tuned {number}", 0.0)
        assert number >= 30


def test_without_a_metric_there_is_no_difference() -> None:
    wanted = Evaluate(metric="none")
    found = compare(scored("base", 0, 0), scored("tuned", 0, 0), held_out(), wanted, 0)
    assert found["difference"] is None
    assert (found["rows"], found["samples"], found["base_scores"]) == (0, [], [])


def test_a_score_that_fell_is_a_difference_below_zero() -> None:
    found = difference([1.0] * 20, [0.0] * 10 + [1.0] * 10)
    assert found is not None
    assert found["score"] == pytest.approx(-0.5)
    assert found["high"] < 0
