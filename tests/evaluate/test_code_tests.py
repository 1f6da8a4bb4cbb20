"""The answer's code is found, run against its row's tests, and rows without tests are named before training."""

import sys

import pytest

from qtune.data.rows import Example
from qtune.errors import DataError
from qtune.evaluate.held_out import refuse_unscorable
from qtune.evaluate.metrics import METRICS, Marks
from qtune.evaluate.metrics.code_tests import code_of, code_tests, fault_of
from qtune.recipe.schema import Evaluate

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="answers are run on Linux only")

DOUBLE = "def double(x):\n    return 2 * x"


def asked(check: str, place: str = "rows.jsonl:1") -> Example:
    return Example([1, 2], [-100, 2], [1], "question", DOUBLE, place, check)


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (DOUBLE, DOUBLE),
        (f"Here it is:\n\n```python\n{DOUBLE}\n```\nIt doubles.\n```\nprint()\n```", DOUBLE + "\n"),
        (f"```\n{DOUBLE}\n```", DOUBLE + "\n"),
        (f"```py\n{DOUBLE}", DOUBLE),
        ("def f():\n    return '```'", "def f():\n    return '```'"),
        ("```python\nx = '''\na ``` b\n'''\n```", "x = '''\na ``` b\n'''\n"),
        ("", ""),
    ],
)
def test_the_code_of_an_answer(answer: str, code: str) -> None:
    assert code_of(answer) == code


@pytest.mark.parametrize(
    ("answer", "parses", "passes"),
    [
        (DOUBLE, 1.0, 1.0),
        (f"Sure!\n```python\n{DOUBLE}\n```", 1.0, 1.0),
        (DOUBLE.replace("2 *", "4 +"), 1.0, 0.0),  # right for one of the two
        ("I do not know.", 0.0, 0.0),
    ],
)
def test_it_parses_and_passes_all_of_its_tests(answer: str, parses: float, passes: float) -> None:
    row = asked("assert double(4) == 8\nassert double(5) == 10")
    assert METRICS["code_tests"].marks(answer, row) == Marks(passes, {"parses": parses, "passes": passes})


def test_tests_without_asserts_are_those_of_the_row() -> None:
    """Some data has a `check(candidate)` that is called at the end."""
    row = asked("def check(candidate):\n    assert candidate(1) == 2\ncheck(double)")
    assert code_tests(DOUBLE, row).score == 1.0


@pytest.mark.parametrize(
    ("check", "fault"),
    [
        ("assert double(1) == 2", None),
        ("", 'has no tests; data.columns.check names the column that holds them, as in { check = "tests" }'),
        (" \n", 'has no tests; data.columns.check names the column that holds them, as in { check = "tests" }'),
        ("assert double(1) =", "has tests that are not Python (invalid syntax, line 1)"),
        ("assert True\nx = '\0'", "has tests that are not Python (source code string cannot contain null bytes)"),
    ],
)
def test_a_row_that_cannot_be_scored_says_why(check: str, fault: str | None) -> None:
    assert fault_of(asked(check)) == fault


def test_such_rows_are_refused_by_place() -> None:
    rows = [asked("assert True"), asked("", "rows.jsonl:2"), asked("(", "rows.jsonl:3")]
    with pytest.raises(DataError) as caught:
        refuse_unscorable(rows, Evaluate(metric="code_tests"))
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("rows.jsonl:2: has no tests; ")
    assert lines[1].startswith("rows.jsonl:3: has tests that are not Python (")
    assert lines[2] == '2 of 3 held-out rows cannot be scored by evaluate.metric = "code_tests".'
