"""Work on many batches: the same results in the same order, however many processes do it and whatever ends them."""

import contextlib
import dataclasses
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from made_faults import write_faulty
from made_work import doubled, end, refuse, whose

from qtune.audit.audit import audit
from qtune.data import tokenize, worker_pool
from qtune.data.prepare import prepare
from qtune.data.worker_pool import BATCHES_HERE, spread
from qtune.errors import DataError, MachineError
from qtune.model.tokenizer import load_tokenizer
from qtune.recipe import load


def is_gone(process: int) -> bool:
    until = time.monotonic() + 20
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{process}/stat").read_text().rsplit(")")[1].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_results_come_in_the_order_of_the_batches(processes: int) -> None:
    assert list(spread(doubled, range(30), processes)) == [(batch, 2 * batch) for batch in range(30)]


def test_few_batches_are_worked_on_here() -> None:
    """A small file must not wait for processes to start."""
    assert {made for _, made in spread(whose, range(BATCHES_HERE), 2)} == {os.getpid()}
    assert len({made for _, made in spread(whose, range(BATCHES_HERE + 4), 2)}) == 3


def test_work_that_cannot_be_sent_is_done_here() -> None:
    assert [made for _, made in spread(lambda batch: batch + 1, range(8), 2)] == list(range(1, 9))


def test_no_more_batches_are_read_than_are_worked_on() -> None:
    """Memory holds a batch for each process, and not the file."""
    read = 0

    def batches() -> Iterator[int]:
        nonlocal read
        while read < 60:
            read += 1
            yield read

    with contextlib.closing(spread(doubled, batches(), 2)) as every:
        for taken, _ in enumerate(every, start=1):
            assert read <= taken + 3


def test_a_refusal_is_told_as_it_was() -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:7: is seven\."):
        list(spread(refuse, range(30), 2))


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGSEGV])
def test_a_process_that_ends_is_said_and_nobody_waits(by: signal.Signals) -> None:
    with pytest.raises(MachineError, match=f"ended before it was done .{by.name}"):
        list(spread(functools.partial(end, by=by), range(30), 2))


def test_all_processes_end_with_the_work() -> None:
    every = spread(whose, range(1000), 2)
    started = {next(every)[1] for _ in range(BATCHES_HERE + 4)} - {os.getpid()}
    assert len(started) == 2
    every.close()
    assert all(map(is_gone, started))


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGINT])
def test_all_processes_end_with_the_one_they_work_for(by: signal.Signals) -> None:
    program = """
import itertools
from qtune.data.worker_pool import spread
from made_work import whose
for batch, made in spread(whose, itertools.count(), 2):
    print(made, flush=True)
"""
    path = os.pathsep.join([*sys.path, os.path.dirname(__file__)])
    running = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert running.stdout is not None
    started = {int(running.stdout.readline()) for _ in range(BATCHES_HERE + 6)} - {running.pid}
    running.send_signal(by)
    running.stdout.close()
    running.wait(timeout=30)
    assert len(started) == 2
    assert all(map(is_gone, started))


@pytest.fixture
def in_three_processes(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """From the first batch on, and batches are of three rows."""
    monkeypatch.setattr(worker_pool, "BATCHES_HERE", 0)
    monkeypatch.setattr(worker_pool, "processes_of_machine", lambda: 3)
    monkeypatch.setattr(tokenize, "BATCH_TEXTS", 3)
    return monkeypatch


@pytest.mark.long
def test_a_check_finds_the_same_whoever_looks(tmp_path: Path, in_three_processes: pytest.MonkeyPatch) -> None:
    write_faulty(tmp_path)
    data = load.load(tmp_path / "faulty.toml", [], False).data
    tokenizer = load_tokenizer(load.load(tmp_path / "faulty.toml", [], False).model)
    spread_out = audit(data, tokenizer, lambda *_: None)
    in_three_processes.undo()
    here = audit(data, tokenizer, lambda *_: None)
    assert here.groups.rows("secret", "duplicate", "near-duplicate") == 3
    assert dataclasses.asdict(spread_out) == dataclasses.asdict(here)


def test_a_run_prepares_the_same_rows_whoever_tokenises(tmp_path: Path, in_three_processes: pytest.MonkeyPatch) -> None:
    monkeypatch = in_three_processes
    monkeypatch.setenv("QTUNE_CACHE", "off")
    write_faulty(tmp_path)
    good = (tmp_path / "faulty.jsonl").read_bytes().splitlines()[:8]
    (tmp_path / "faulty.jsonl").write_bytes(b"\n".join(good))
    recipe = load.load(tmp_path / "faulty.toml", [], False)
    tokenizer = load_tokenizer(recipe.model)
    spread_out = prepare(recipe, tokenizer)
    monkeypatch.undo()
    monkeypatch.setenv("QTUNE_CACHE", "off")
    assert prepare(recipe, tokenizer).fingerprint == spread_out.fingerprint


@pytest.mark.parametrize("module", ["qtune.data.row_stream", "qtune.audit.row_checks"])
def test_what_a_process_loads_to_encode_rows_is_light(module: str) -> None:
    """Two seconds of each processor went to torch, which no row needs, before the first one was encoded."""
    code = f"import {module}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
