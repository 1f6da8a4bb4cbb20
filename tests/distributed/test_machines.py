"""Two machines, which are network namespaces with a wire between them: torchrun on each, and one run on both."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from made_machines import Machine, two_machines
from stopped_runs import ADAPTER, write_recipe

pytestmark = [pytest.mark.long, pytest.mark.skipif(sys.platform != "linux", reason="namespaces are Linux's")]
ROOT = Path(__file__).resolve().parent.parent.parent
TORCHRUN = ("-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1")
C10D = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "node0:29500", "--rdzv-id", "my")


@pytest.fixture
def machines() -> Iterator[tuple[Machine, Machine]]:
    with two_machines() as made:
        yield made


def started(machine: Machine, place: Path, *words: str | Path, before: str = "") -> subprocess.Popen:
    arguments = (*TORCHRUN, *C10D, "-m", "qtune", *words)
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "QTUNE_RANKS_LIMIT": "60s"}
    return machine.start(arguments, place, before, **environment)


def test_one_run_on_two_machines_is_that_of_one(machines: tuple[Machine, Machine], tmp_path: Path, tiny_base) -> None:
    write_recipe(tmp_path, tiny_base)
    both = [started(machine, tmp_path, "run", "t.toml", "--output", "runs/both") for machine in machines]
    told = [process.communicate(timeout=240)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    here = ["-m", "qtune", "run", "t.toml", "--cards", "2", "--output", "runs/here"]
    subprocess.run([sys.executable, *here], cwd=tmp_path, check=True, capture_output=True, timeout=240)
    one, other = ((tmp_path / "runs" / name / ADAPTER).read_bytes() for name in ("both", "here"))
    assert one == other


def test_a_folder_that_one_machine_has_for_itself_is_refused_before_training(
    machines: tuple[Machine, Machine], tmp_path: Path, tiny_base
) -> None:
    write_recipe(tmp_path, tiny_base)
    runs = tmp_path / "runs"
    runs.mkdir()
    own = ("", f"mount -t tmpfs own {runs}")
    words = ("run", "t.toml", "--output", "runs/mine")
    both = [started(machine, tmp_path, *words, before=mount) for machine, mount in zip(machines, own, strict=True)]
    told = "".join(process.communicate(timeout=240)[0] for process in both)
    assert all(process.returncode for process in both)
    second = machines[1].name
    assert told.count(f"rank 1 on {second} cannot see what rank 0 on {machines[0].name} writes there.") == 1
    assert not (runs / "mine").exists()
