"""Real processes over gloo: what each is told, and who is named when one is late or gone."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from made_ranks import TORCHRUNS, all_well, free_port, launch

from qtune.distributed.launched import Launched, first_host
from qtune.distributed.ranks import ALONE, Ranks
from qtune.errors import MachineError, RankLost


def numbers(rank: int, count: int):
    import torch

    return torch.randn(count, generator=torch.Generator().manual_seed(rank)) * 10 ** (rank % 3)


def every_call(ranks: Ranks, folder: str) -> None:
    """Notes what this rank was told."""
    import torch

    place = Path(folder)
    long = {"rank": ranks.rank, "text": "é" * (2000 if ranks.rank == 1 else 3)}
    sums = {}
    for count in (1, 3, 7, 1000):
        total = ranks.sum_in_order(numbers(ranks.rank, count))
        exact = numbers(0, count)
        for rank in range(1, ranks.size):
            exact = exact + numbers(rank, count)
        sums[count] = [torch.equal(total, exact), total.numpy().tobytes().hex()[:64]]
    with ranks.one_before_others("cache"):
        order = len(list(place.glob("began-*")))
        (place / f"began-{ranks.rank}").touch()
        time.sleep(0.3 if ranks.rank == 0 else 0.0)
    told = {
        "ranks": ranks.gather(ranks.rank),
        "long": [len(each["text"]) for each in ranks.gather(long)],
        "first": ranks.broadcast({"seed": 7 + ranks.rank}),
        "sums": sums,
        "order": order,
        "environment": sorted(name for name in TORCHRUNS if name in os.environ),
    }
    (place / f"{ranks.rank}.json").write_text(json.dumps(told))


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.long)])
def test_every_rank_is_told_the_same(tmp_path, size) -> None:
    all_well(launch(size, every_call, str(tmp_path)))
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(size)]
    for each in told:
        assert each["ranks"] == list(range(size))
        assert each["long"] == [2000 if rank == 1 else 3 for rank in range(size)]
        assert each["first"] == {"seed": 7}
        assert all(is_in_order for is_in_order, _ in each["sums"].values())
        assert each["sums"] == told[0]["sums"]
        assert each["environment"] == []
    assert [each["order"] > 0 for each in told] == [False] + [True] * (size - 1)


def what_becomes_of_others(ranks: Ranks, folder: str, fault: str) -> None:
    """Rank 1 meets a fault between two calls; the other notes what it is told, and when."""
    ranks.gather(0)
    if ranks.rank == 1:
        if fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "hangs":
            time.sleep(5)
        if fault == "fails":
            ranks.fail("There is no card.", 2)
        os._exit(0)
    start = time.monotonic()
    try:
        ranks.gather(1)
    except RankLost as lost:
        tells = ranks.fail(str(lost), 1)
        told = [str(lost), lost.rank, lost.exit_code, tells, time.monotonic() - start]
        (Path(folder) / f"{fault}.json").write_text(json.dumps(told))
    os._exit(0)


def what_others_are_told(ranks: Ranks, folder: str) -> None:
    """Rank 1 is killed in a call, when it has noted that it came; the last of three comes after the first knows."""
    from qtune.distributed import ranks as module

    ranks.gather(0)
    if ranks.rank == 1:
        module._gather_into = lambda *given: os.kill(os.getpid(), signal.SIGKILL)
    if ranks.rank == 2:
        time.sleep(1.0)
    try:
        ranks.gather(1)
    except RankLost as lost:
        if ranks.rank == 2:
            time.sleep(1.0)
        Path(folder, f"{ranks.rank}.json").write_text(json.dumps([str(lost), ranks.fail(str(lost), 1)]))
    os._exit(0)


def what_is_told_of_the_first(ranks: Ranks, folder: str, waits: int) -> None:
    """Rank 0, which has the store, is stopped, like a machine that is frozen; the other notes what it is told."""
    ranks.gather(0)
    if ranks.is_first:
        os.kill(os.getpid(), signal.SIGSTOP)
    try:
        with ranks.one_before_others("base") if waits else contextlib.nullcontext():
            ranks.gather(1)
    except RankLost as lost:
        Path(folder, f"waits-{waits}.json").write_text(json.dumps([str(lost), ranks.fail(str(lost), 1)]))
    os._exit(0)


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> Path:
    """What each of these notes, all at the same time: they wait most of it."""
    folder = tmp_path_factory.mktemp("told")
    soon = {"QTUNE_RANKS_LIMIT": "2s"}
    killed = launch(3, what_others_are_told, str(folder))
    first = [launch(2, what_becomes_of_others, str(folder), fault, **soon) for fault in ("killed", "hangs", "fails")]
    stopped = [launch(2, what_is_told_of_the_first, str(folder), waits, **soon) for waits in (0, 1)]
    try:
        for each in stopped:
            each.processes[1].wait(60)
    finally:
        for each in stopped:
            os.kill(each.processes[0].pid, signal.SIGKILL)
        for each in (killed, *first, *stopped):
            each.wait(60)
    return folder


def test_the_rank_that_fails_or_is_late_is_named(told) -> None:
    killed, hung, failed = (json.loads((told / f"{fault}.json").read_text()) for fault in ("killed", "hangs", "fails"))
    assert killed[:4] == ["Rank 1 ended, or its machine did, without a word.", 1, 1, True]
    assert hung[0].startswith("Rank 1 did not come to where the others wait within 2 s, though it lives.")
    assert failed[:4] == ["Rank 1: There is no card.", 1, 2, True]
    assert max(killed[4], hung[4], failed[4]) < 15


def test_all_are_told_the_same_of_one_that_dies_in_a_call(told) -> None:
    first, last = (json.loads((told / f"{rank}.json").read_text()) for rank in (0, 2))
    assert first == ["Rank 1 ended, or its machine did, without a word.", True]
    assert last == [first[0], False]


@pytest.mark.parametrize("waits", [0, 1])
def test_a_first_rank_that_is_stopped_is_missed(told, waits) -> None:
    """By whoever waits in a call, and by whoever waits for what it does first."""
    noted = json.loads((told / f"waits-{waits}.json").read_text())
    assert noted == ["Rank 0 is gone, without which the ranks do not find each other.", True]


def test_one_process_is_answered_at_once_and_loads_nothing() -> None:
    code = """
import sys
from qtune.distributed.launched import Launched
from qtune.distributed.ranks import ALONE, Ranks
ranks = Ranks.join(Launched.taken({}))
assert ranks is ALONE and ranks.gather({"a": 1}) == [{"a": 1}] and ranks.broadcast(3) == 3
flat = object()
assert ranks.sum_in_order(flat) is flat and ranks.fail("", 1)
with ranks.one_before_others("x"):
    ranks.leave()
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert ALONE.is_first


def test_what_launchers_say_is_taken_out_of_the_environment() -> None:
    torchrun = {
        "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1", "MASTER_ADDR":
        "node1", "MASTER_PORT": "29400", "TORCHELASTIC_USE_AGENT_STORE": "True", "ACCELERATE_MIXED_PRECISION": "no",
        "PATH": "/bin", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "a", "SLURM_STEP_NUM_TASKS": "2",
    }  # fmt: skip
    assert Launched.taken(torchrun) == Launched(3, 4, 1, 2, "node1", 29400, keeps_store=True)
    assert [name for name in torchrun if not name.startswith("SLURM")] == ["PATH"]
    slurm = {
        "SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "n[07-08],x",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_JOB_ID": "123456",
    }  # fmt: skip
    assert Launched.taken(slurm) == Launched(2, 4, 0, 2, "n07", 23456)
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    assert Launched.taken(alone) is None
    assert alone == {}
    batch_script = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}
    assert Launched.taken(batch_script) is None


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"}, "MASTER_ADDR"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK"),
    ],
)
def test_what_is_half_said_is_refused_by_name(said, name) -> None:
    with pytest.raises(MachineError, match=name):
        Launched.taken(said)


@pytest.mark.parametrize(
    ("nodes", "first"), [("node[07-09,12],big1", "node07"), ("a,b", "a"), ("solo", "solo"), ("r[1,3]c", "r1c")]
)
def test_the_first_host_of_slurms_lists(nodes, first) -> None:
    assert first_host(nodes) == first


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(MachineError, match=rf"^Port {port} of this machine is taken, .* MASTER_PORT for srun, "):
            Ranks.join(Launched(0, 2, 0, 2, "127.0.0.1", port))


def test_cards_without_what_they_talk_over_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from qtune import accelerator

    monkeypatch.setattr(accelerator, "cards", lambda: [torch.device("cuda")])
    with pytest.raises(MachineError, match=r"^Several cards talk over NCCL, and this torch .* or use one card: --c"):
        Ranks.join(Launched(0, 2, 0, 2, "127.0.0.1", free_port()))
