"""A small part of every lane of the fault lab; `scripts/torture.py` runs them at length."""

import subprocess
import sys
from pathlib import Path

import forked
import pytest

TORTURE = Path(__file__).resolve().parent.parent / "scripts" / "torture.py"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the lab forks, traces and limits as Linux does")


# How many cases of each lane, as quick as it can be and still see the fault, and at some length.
QUICK = {"O1": 4, "L1": 6, "L3": 5, "B1": 30, "B2": 150}
AT_LENGTH = {
    "R1": 6,
    "R4": 100,
    "R7": 2,
    "R9": 6,
    "R10": 4,
    "L1": 50,
    "L2": 1,
    "L3": 100,
    "L5": 4,
    "B1": 1000,
    "B2": 2000,
    "B4": 8,
}


def torture(*arguments: str) -> subprocess.CompletedProcess[str]:
    return forked.run([TORTURE, *arguments])


@pytest.mark.parametrize("lane", QUICK)
def test_no_case_fails(lane: str, tmp_path: Path) -> None:
    assert_no_case_fails(lane, QUICK[lane], tmp_path / "torture.md")


@pytest.mark.long
@pytest.mark.parametrize("lane", AT_LENGTH)
def test_none_of_many_cases_fails(lane: str, tmp_path: Path) -> None:
    assert_no_case_fails(lane, AT_LENGTH[lane], tmp_path / "torture.md")


def assert_no_case_fails(lane: str, count: int, page: Path) -> None:
    ended = torture("--only", lane, "--cases", f"{lane}={count}", "--seed", "1", "--output", str(page))
    assert ended.returncode == 0, ended.stdout + ended.stderr[-2000:]
    rows = [[cell.strip() for cell in line.split("|")] for line in page.read_text().splitlines() if line[:2] == "| "]
    assert [(row[1], row[3], row[4]) for row in rows[1:]] == [(lane, f"{count:,}", "0")]


def test_an_unknown_lane_is_named() -> None:
    ended = torture("--only", "R1", "--cases", "R2=3")
    assert ended.returncode == 1
    assert ended.stderr == "--cases R2=3: must be LANE=NUMBER, the lane one of R1.\n"


def test_a_failure_is_told_in_full_and_exits_1(tmp_path: Path) -> None:
    """A lane that fails is put beside the others."""
    (tmp_path / "failing.py").write_text(
        'WHAT = "fails"\ndef run(cases, seed, folder):\n    yield None\n    yield f"seed {seed} was bad"\n'
    )
    code = (
        f"import sys; sys.path[:0] = [{str(TORTURE.parent)!r}, {str(tmp_path)!r}]; import torture, failing;"
        " sys.modules['fault_lab.failing'] = failing; torture.LANES['X1'] = ('failing', 2);"
        f" sys.argv = ['torture.py', '--only', 'X1', '--seed', '7', '--output', {str(tmp_path / 'page.md')!r}];"
        " torture.main()"
    )
    ended = forked.run(["-c", code])
    assert ended.returncode == 1, ended.stderr
    assert "X1 case 2: seed 7 was bad\n  again: scripts/torture.py --only X1 --seed 7 --cases X1=2" in ended.stdout
    page = (tmp_path / "page.md").read_text()
    assert "| X1 | fails | 2 | 1 |" in page
    assert "X1 case 2: seed 7 was bad" in page
