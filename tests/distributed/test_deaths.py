"""A rank that dies in the middle of a run, on two processes that `qtune run` has launched itself."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
from stopped_runs import ADAPTER, write_recipe

ROOT = Path(__file__).resolve().parent.parent.parent
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it looks into /proc")


def qtune(folder: Path, *words: str) -> subprocess.CompletedProcess:
    return forked.run(["-m", "qtune", *words, "--cards", "2"], folder, environment())


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "QTUNE_RANKS_LIMIT": "20s"}


def told_by(run: Path) -> list[dict]:
    """The events of a run, times left out."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if not key.endswith("_seconds")} for line in lines]


def rank_of(pid: int, rank: int) -> int:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    return int(children[rank])


def wait_for_checkpoint(run: Path) -> None:
    until = time.monotonic() + 60
    while not any(run.glob("checkpoints/step-*")):
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.long  # test_ranks has one that is killed between two calls
def test_one_dies_the_other_saves_and_it_goes_on_exactly(tmp_path: Path, tiny_base: Path) -> None:
    write_recipe(tmp_path, tiny_base, data={"train": "rows.jsonl", "held_out_fraction": 0.2, "max_tokens": 128})
    alone = qtune(tmp_path, "run", "t.toml", "--output", "alone")
    assert alone.returncode == 0, alone.stderr
    with open(os.devnull) as nothing, (tmp_path / "told").open("w+") as told:
        words = ["-m", "qtune", "run", "t.toml", "--output", "killed", "--cards", "2"]
        streams = [nothing.fileno(), told.fileno(), told.fileno()]
        run = forked.Forked(words, streams, tmp_path, environment())
        wait_for_checkpoint(tmp_path / "killed")
        os.kill(rank_of(run.pid, 1), signal.SIGKILL)
        code = run.wait(timeout=60)
    said = (tmp_path / "told").read_text()
    assert code == 1, said
    assert "Rank 1 was ended by SIGKILL" in said
    assert "qtune resume killed" in said
    again = qtune(tmp_path, "resume", "killed")
    assert again.returncode == 0, again.stderr
    assert told_by(tmp_path / "killed") == told_by(tmp_path / "alone")
    assert (tmp_path / "killed" / ADAPTER).read_bytes() == (tmp_path / "alone" / ADAPTER).read_bytes()
