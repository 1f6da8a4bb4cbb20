"""A small part of every lane of the fault lab; `scripts/torture.py` runs them at length."""

import subprocess
import sys
from pathlib import Path

import forked
import pytest

TORTURE = Path(__file__).resolve().parent.parent / "scripts" / "torture.py"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the lab forks, traces and limits as Linux does")


def torture(*arguments: str) -> subprocess.CompletedProcess[str]:
    return forked.run([TORTURE, *arguments])


def test_no_lane_fails(tmp_path: Path) -> None:
    lanes = {"R1": 2, "R4": 20, "R7": 1, "R9": 2, "O1": 4, "L1": 6, "L2": 1, "L3": 30, "L5": 2}
    lanes |= {"B1": 60, "B2": 300, "B4": 4}
    cases = [f"{lane}={count}" for lane, count in lanes.items()]
    ended = torture("--only", *lanes, "--cases", *cases, "--seed", "1", "--output", str(tmp_path / "torture.md"))
    assert ended.returncode == 0, ended.stdout + ended.stderr[-2000:]
    page = (tmp_path / "torture.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")] for line in page.splitlines() if line.startswith("| ")][1:]
    assert {row[1]: (row[3], row[4]) for row in rows} == {lane: (str(count), "0") for lane, count in lanes.items()}


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
