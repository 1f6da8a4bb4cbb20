"""What is a fault and what a warning depends on the recipe, and every sentence can be read."""

from pathlib import Path

import pytest
from conftest import byte_tokenizer
from made_faults import LINES, MAX_TOKENS, good, write_faulty

from qtune.audit.audit import audit
from qtune.audit.issues import Issue
from qtune.audit.thresholds import Checked, judge
from qtune.recipe.schema import Data


def judged(folder: Path, **settings: object) -> Checked:
    data = Data(train=str(folder / "faulty.jsonl"), max_tokens=MAX_TOKENS, **settings)
    return judge(audit(data, byte_tokenizer(), lambda *told: None), data)


def by_code(checked: Checked) -> dict[str, Issue]:
    return {finding.code: finding for finding in checked.findings}


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    write_faulty(tmp_path)
    return tmp_path


def test_faults_stand_before_warnings_and_every_kind_has_a_sentence(faulty: Path) -> None:
    checked = judged(faulty, held_out=str(faulty / "held_out.jsonl"))
    levels = [finding.level for finding in checked.findings]
    assert levels == sorted(levels)
    assert by_code(checked).keys() == {*LINES, "overlap"}
    for finding in checked.findings:
        assert finding.sentence.endswith(".")
        assert finding.advice
        assert "{" not in finding.sentence
    assert checked.outcome == "faults"


def test_bad_rows_are_faults_unless_they_are_to_be_dropped(faulty: Path) -> None:
    bad = by_code(judged(faulty))["empty-text"]
    assert bad.level == "fault"
    assert bad.sentence == (
        '1 of 24 rows has an empty text (4.2 %), and `qtune run` refuses them (data.on_bad_row = "error").'
    )
    assert 'data.on_bad_row = "drop"' in bad.advice
    dropped = by_code(judged(faulty, on_bad_row="drop", check={"max_dropped_fraction": 0.5}))["empty-text"]
    assert dropped.level == "warning"
    assert dropped.advice == "They are skipped; mend them to learn from them."


def test_too_many_dropped_rows_are_a_fault_together(faulty: Path) -> None:
    """Seven of 24, of which no kind alone is above the limit."""
    found = by_code(judged(faulty, on_bad_row="drop", check={"max_dropped_fraction": 0.2}))["empty-text"]
    assert found.level == "fault"
    assert found.sentence.endswith("; 29.2 % of all are of no use, more than data.check.max_dropped_fraction = 0.2.")


@pytest.mark.parametrize(
    ("code", "setting"),
    [("too-long", "max_long_fraction"), ("duplicate", "max_duplicate_fraction")],
)
@pytest.mark.parametrize(("limit", "level"), [(0.04, "fault"), (0.05, "warning")])
def test_a_share_is_held_against_its_threshold(faulty: Path, code: str, setting: str, limit: float, level: str) -> None:
    """One row in 24 is 4.2 %."""
    assert by_code(judged(faulty, check={setting: limit}))[code].level == level


@pytest.mark.parametrize(("limit", "level"), [(0.4, "fault"), (0.5, "warning")])
def test_overlap_is_a_share_of_the_held_out_rows(faulty: Path, limit: float, level: str) -> None:
    held_out = str(faulty / "held_out.jsonl")
    found = by_code(judged(faulty, held_out=held_out, check={"max_overlap_fraction": limit}))["overlap"]
    assert found.level == level
    assert found.sentence.startswith("1 of 2 rows held out is trained on too (50.0 %)")


def test_long_rows_are_a_fault_where_the_recipe_says_so(faulty: Path) -> None:
    found = by_code(judged(faulty, on_long="error"))["too-long"]
    assert found.level == "fault"
    assert "trained tokens" in found.sentence


def test_long_rows_that_are_cut_are_judged_by_what_goes_with_the_rest(faulty: Path) -> None:
    """Of rows whose answers stood at the front it said "0 of 430 trained tokens, more than 0.05": a fault to no run."""
    checked = judged(faulty, on_long="truncate", check={"max_long_fraction": 0.04})
    share = checked.tokens.lost_trained_tokens / checked.tokens.trained_tokens
    assert 0 < share < 1
    for limit, level in ((share * 0.99, "fault"), (share * 1.01, "warning")):
        found = judged(faulty, on_long="truncate", check={"max_long_fraction": limit})
        assert by_code(found)["too-long"].level == level


def test_an_empty_source_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "faulty.jsonl").write_text("\n\n")
    checked = judged(tmp_path)
    assert [finding.code for finding in checked.findings] == ["no-rows"]
    assert checked.outcome == "faults"


def test_nothing_found_is_fine(tmp_path: Path) -> None:
    (tmp_path / "faulty.jsonl").write_text(good(1) + "\n" + good(2))
    assert judged(tmp_path).outcome == "fine"
