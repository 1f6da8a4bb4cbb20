"""The check as a person reads it, and as a program does."""

import dataclasses
import json

import pytest
from rich.console import Console

from qtune.audit.audit import SourceCounts
from qtune.audit.issues import Issue, Place
from qtune.audit.thresholds import Checked
from qtune.data.stop_tokens import StopChain
from qtune.data.unused_columns import Unused
from qtune.report.audit_table import audit_json, audit_table, verdict_line

PLACES = tuple(Place(f"rows.jsonl:{line}", "the answer is null") for line in range(1, 6))
FAULT = Issue("missing-answer", "fault", 5, "5 of 9 rows lack an answer.", "Mend them.", PLACES)
WARNING = Issue("duplicate", "warning", 1, "1 of 9 rows repeats one.", "", (Place("rows.jsonl:7\x1b[31m", "is x"),))


def checked(*findings: Issue) -> Checked:
    stops = StopChain("<|end|>", "<|end|>", ("<|end|>",), "generation_config.json", ())
    return Checked((SourceCounts("rows.jsonl", False, "messages", 9, 4, 4),), findings, None, stops)


def shown(found: Checked, shows_all: bool = False) -> str:
    console = Console(width=100, color_system=None)
    with console.capture() as capture:
        console.print(audit_table(found, shows_all))
    return capture.get()


def test_a_finding_is_a_sentence_its_first_places_and_what_would_work() -> None:
    lines = shown(checked(FAULT)).splitlines()
    assert lines[:6] == [
        "fault[missing-answer]: 5 of 9 rows lack an answer.",
        "  rows.jsonl:1: the answer is null".ljust(100),
        "  rows.jsonl:2: the answer is null".ljust(100),
        "  rows.jsonl:3: the answer is null".ljust(100),
        "  and 2 more".ljust(100),
        "  → Mend them.".ljust(100),
    ]


def test_all_places_on_request() -> None:
    text = shown(checked(FAULT), shows_all=True)
    assert all(place.place in text for place in PLACES)
    assert "more" not in text


def test_control_characters_of_the_data_do_not_reach_the_terminal() -> None:
    assert "\x1b" not in shown(checked(WARNING))
    assert "␛[31m" in shown(checked(WARNING))


def test_the_facts_follow() -> None:
    text = shown(checked())
    assert "9 rows of rows.jsonl (messages), 4 usable" in text
    assert "they agree" in text


@pytest.mark.parametrize(
    ("findings", "line"),
    [
        ((), "Nothing is wrong with 9 rows."),
        ((WARNING,), "1 warning in 9 rows."),
        ((FAULT, FAULT), "2 faults in 9 rows."),
        ((FAULT, WARNING), "1 fault and 1 warning in 9 rows."),
    ],
)
def test_the_verdict_counts(findings: tuple[Issue, ...], line: str) -> None:
    assert verdict_line(checked(*findings)).plain == line


def test_json_holds_every_place_and_the_outcome() -> None:
    found = json.loads(json.dumps(audit_json(checked(FAULT, WARNING))))
    assert found["outcome"] == "faults"
    assert [len(finding["places"]) for finding in found["findings"]] == [5, 1]
    assert found["stops"]["served_by"] == "generation_config.json"


def test_what_is_good_to_know_is_no_fault() -> None:
    """Columns that nobody need read, texts in pieces, and how a file was read: a line each, and all is well."""
    found = dataclasses.replace(
        checked(),
        unused=(Unused("id", 9, None), Unused("source", 1, None)),
        cut_texts=1,
        pieces=113,
        notices=("a.csv: its columns are parted by semicolons.",),
    )
    text = shown(found)
    assert "not used" in text
    assert "`id` (9 rows), `source` (1 row)" in text
    assert "1 text cut into 113 pieces; nothing of it is lost." in text
    assert "parted by semicolons" in text
    assert text.rstrip().endswith("Nothing is wrong with 9 rows.")


def test_one_row_is_one_row() -> None:
    one = dataclasses.replace(checked(), sources=(SourceCounts("rows.jsonl", False, "messages", 1, 1, 1),))
    assert verdict_line(one).plain == "Nothing is wrong with 1 row."
    assert "1 row of rows.jsonl" in shown(one)
