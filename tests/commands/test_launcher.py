"""Several processes on one machine: which cards they have, what they are told, and that all end when one does."""

import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
from made_driver import leave_as_it_was

from qtune import gpu_choice
from qtune.commands import launcher
from qtune.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
THREE = """\
GPU-aa, NVIDIA GeForce RTX 3090, 24576, 20000, 580.95.05, Default, Enabled
GPU-bb, NVIDIA GeForce RTX 3090, 24576, 24000, 580.95.05, Default, Disabled
GPU-cc, NVIDIA GeForce RTX 3060, 12288, 11900, 580.95.05, Default, Disabled
"""
RANK = """
import os, signal, sys, time
from qtune.commands import launcher
from qtune.distributed.launched import Launched

launcher.SECONDS_AFTER_RANK_0 = 1.0
launcher.SECONDS_BEFORE_THEY_MET = 2.0
launcher.POLL_SECONDS = 0.1
code = launcher.fork_ranks(3)
if code is not None:
    sys.exit(code)
rank, how = int(os.environ["RANK"]), sys.argv[1]
told = [os.environ[name] for name in ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")]
os.write(1, f"{' '.join([str(rank), *told])}\\n".encode())

def stop(number, frame):
    open(f"{rank} stopped", "w").close()
    sys.exit(128 + number)

signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
open(f"{rank} is here", "w").close()
if how != "alone":
    Launched.taken().tell_met()
if rank == 1 and how == "alone":
    sys.exit("This card is asleep.")
if how.startswith("killed") and how.endswith(str(rank)):
    os.kill(os.getpid(), signal.SIGKILL)
if how.startswith("hung") and how.endswith(str(rank)):
    os.kill(os.getpid(), signal.SIGSTOP)
if how.startswith(("killed", "hung")):
    time.sleep(0.3)
    sys.exit(f"rank {rank} misses another")
if how in ("signalled", "alone"):
    time.sleep(20)
"""


def ranks(folder: Path, how: str, limit: str = "1s") -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "QTUNE_RANKS_LIMIT": limit}
    return subprocess.Popen(
        [sys.executable, "-c", RANK, how],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err


def here(folder: Path, said: str) -> list[str]:
    return sorted(path.name for path in folder.glob(f"* {said}"))


def wait_for_all(folder: Path, said: str) -> None:
    until = time.monotonic() + 10
    while len(here(folder, said)) < 3:
        assert time.monotonic() < until, here(folder, said)
        time.sleep(0.02)


def test_ranks_are_told_what_torchrun_tells(tmp_path: Path) -> None:
    code, out, told = ended(ranks(tmp_path, "well"))
    assert (code, told) == (0, "")
    assert sorted(out.splitlines()) == [f"{rank} 3 {rank} 3 127.0.0.1" for rank in range(3)]
    assert len(here(tmp_path, "is here")) == 3


def test_a_killed_rank_is_named_and_the_first_one_says_the_rest(tmp_path: Path) -> None:
    code, _, told = ended(ranks(tmp_path, "killed 1"))
    assert code == 1
    assert "rank 0 misses another" in told
    assert told.endswith("Rank 1 was ended by SIGKILL, as the system does where memory runs out.\n")


def test_where_the_first_is_killed_its_signal_is_the_exit_code(tmp_path: Path) -> None:
    code, _, told = ended(ranks(tmp_path, "killed 0"))
    assert code == 128 + signal.SIGKILL
    assert "rank 1 misses another" in told
    assert "Rank 0 was ended by SIGKILL" in told


@pytest.mark.parametrize("rank", [0, 2])
def test_a_hung_rank_is_killed_after_the_others(rank: int, tmp_path: Path) -> None:
    """As long after them as ranks wait for one, which a user can say."""
    code, _, told = ended(ranks(tmp_path, f"hung {rank}"))
    assert code == 1
    assert told.endswith(f"Rank {rank} did not end with the others, and was killed.\n")


def test_those_that_wait_to_meet_one_that_has_failed_are_ended_soon(tmp_path: Path) -> None:
    """Whatever the ranks' limit: they have nothing to save."""
    code, _, told = ended(ranks(tmp_path, "alone", limit="20min"))
    assert code == 1
    killed = [f"Rank {rank} did not end with the others, and was killed." for rank in (0, 2)]
    assert told.splitlines() == ["This card is asleep.", *killed]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_is_passed_on_to_all(tmp_path: Path, number: signal.Signals) -> None:
    process = ranks(tmp_path, "signalled")
    wait_for_all(tmp_path, "is here")
    process.send_signal(number)
    assert ended(process)[0] == 128 + number
    assert len(here(tmp_path, "stopped")) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_ranks_stop_with_a_launcher_that_is_killed(tmp_path: Path) -> None:
    process = ranks(tmp_path, "signalled")
    wait_for_all(tmp_path, "is here")
    process.kill()
    ended(process)
    wait_for_all(tmp_path, "stopped")


@pytest.fixture
def three_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{THREE}END\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    leave_as_it_was(gpu_choice.VISIBLE, monkeypatch)


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many ranks are asked for."""
    counts: list[int] = []
    monkeypatch.setattr(launcher, "fork_ranks", lambda count: counts.append(count) or 0)
    for name in ("RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    return counts


def launched(cards: int | None, accumulation: int = 8) -> int | None:
    train = SimpleNamespace(micro_batch=1, gradient_accumulation=accumulation)
    return launcher.launch_ranks(Namespace(cards=cards, json=False), lambda: SimpleNamespace(train=train))


@pytest.mark.usefixtures("three_cards")
def test_all_cards_that_are_alike_are_used_and_it_is_said(forked: list[int], capsys: pytest.CaptureFixture) -> None:
    assert launched(None) == 0
    assert forked == [2]
    assert os.environ[gpu_choice.VISIBLE] == "GPU-aa,GPU-bb"
    assert capsys.readouterr().out == "2 cards: a process for each; --cards 1 uses one\n"


@pytest.mark.usefixtures("three_cards")
@pytest.mark.parametrize(
    ("cards", "count", "visible"), [(3, [3], "GPU-aa,GPU-bb,GPU-cc"), (2, [2], "GPU-aa,GPU-bb"), (1, [], "GPU-bb")]
)
def test_as_many_as_asked_for_the_roomiest_first(forked: list[int], cards: int, count: list[int], visible: str) -> None:
    """Cards that are not alike, too, where they are asked for."""
    launched(cards)
    assert (forked, os.environ[gpu_choice.VISIBLE]) == (count, visible)


@pytest.mark.usefixtures("three_cards")
def test_of_the_cards_that_the_user_names(forked: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(gpu_choice.VISIBLE, "2,0")
    launched(None)
    assert (forked, os.environ[gpu_choice.VISIBLE]) == ([2], "2,0")
    with pytest.raises(UserError, match=r"^--cards 3: CUDA_VISIBLE_DEVICES names 2\. Give --cards 2\.$"):
        launched(3)
    monkeypatch.setenv(gpu_choice.VISIBLE, "")
    assert launched(None) is None


@pytest.mark.usefixtures("three_cards")
def test_more_cards_than_there_are(forked: list[int]) -> None:
    with pytest.raises(UserError, match=r"^--cards 4: this machine has 3\. Give --cards 3\.$"):
        launched(4)


@pytest.mark.usefixtures("three_cards")
def test_a_card_without_a_pack_is_not_used_unless_it_is_asked_for(forked: list[int]) -> None:
    assert launched(None, accumulation=1) is None
    assert gpu_choice.VISIBLE not in os.environ  # the one is chosen as ever
    with pytest.raises(
        UserError, match=r"^--cards: 2 are too many, as a step of this recipe is 1 pack .* Take 1, or raise"
    ):
        launched(2, accumulation=1)
    assert forked == []


def test_without_a_card_there_are_as_many_processes_as_asked_for(
    forked: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launched(None) is None
    assert launched(1) is None
    assert launched(2) == 0
    assert forked == [2]


@pytest.mark.parametrize(("name", "value"), [("RANK", "0"), ("SLURM_STEP_NUM_TASKS", "4")])
def test_another_launcher_has_settled_it(
    forked: list[int], monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    assert launched(2) is None
    assert forked == []
    with pytest.raises(UserError, match=r"^--cards: torchrun, accelerate or srun has settled"):
        launcher.refuse_cards_when_launched(Namespace(cards=2))
    launcher.refuse_cards_when_launched(Namespace(cards=None))
