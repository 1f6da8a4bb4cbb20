"""Which of several cards is taken, in a process of our own and in somebody else's, and what is said of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from made_driver import RTX_3060, RTX_4090, MadeCard, MadeDriver, leave_as_it_was, uuid_of

from qtune import gpu_choice
from qtune.distributed.launched import Launched
from qtune.errors import MachineError
from qtune.units import GIB, MIB

ROOT = Path(__file__).resolve().parent.parent
ANSWER = """\
GPU-aa, NVIDIA GeForce RTX 4090, 24564, 1200, 580.95.05, Default, Enabled
GPU-bb, NVIDIA GeForce RTX 3060, 12288, 11900, 580.95.05, Default, Disabled
GPU-cc, NVIDIA GB10, [N/A], [N/A], 580.95.05, Default, Disabled
"""


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An `nvidia-smi` on the PATH that prints this and ends so."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    leave_as_it_was(gpu_choice.VISIBLE, monkeypatch)
    monkeypatch.setattr(gpu_choice, "_why_narrowed", [])

    def answers(text: str, status: int = 0) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\ncat <<'END'\n{text}END\nexit {status}\n")
        program.chmod(0o755)

    return answers


def test_the_driver_is_asked_in_its_own_words(smi) -> None:
    smi(ANSWER)
    first, second, third = gpu_choice.ask_driver()
    assert (first.total_bytes, first.free_bytes, first.has_display) == (24564 * MIB, 1200 * MIB, True)
    assert (second.uuid, second.name, second.has_display) == ("GPU-bb", "NVIDIA GeForce RTX 3060", False)
    assert (third.free_bytes, third.driver) == (None, "580.95.05")


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n", 9),
        ("No devices were found\n", 0),
        ('Field "display_active" is not a valid field to query.\n', 2),
        ("", 0),
    ],
)
def test_a_driver_that_does_not_answer_has_no_cards(smi, text: str, status: int) -> None:
    smi(text, status)
    assert gpu_choice.ask_driver() == ()
    gpu_choice.narrow_own_process()
    assert gpu_choice.VISIBLE not in os.environ


def test_a_machine_without_a_driver_has_no_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_choice.ask_driver() == ()


def test_our_own_process_sees_the_card_with_most_free_memory(smi) -> None:
    """Not the largest one, which shows the desktop."""
    smi(ANSWER)
    gpu_choice.narrow_own_process()
    assert os.environ[gpu_choice.VISIBLE] == "GPU-bb"
    index, why = gpu_choice.chosen(["bb"])
    assert index == 0
    assert why == "most free memory of 3 cards; the others: NVIDIA GeForce RTX 4090 1.2 GiB, NVIDIA GB10"


def one_of(local_size: int, local_rank: int) -> Launched:
    return Launched(local_rank, local_size, local_rank, local_size, "127.0.0.1", 29400)


def test_several_processes_of_a_machine_take_a_card_each(smi, monkeypatch: pytest.MonkeyPatch) -> None:
    """The roomiest, in the driver's order, which is the same in all of them."""
    smi(ANSWER)
    for local_rank, uuid in enumerate(["GPU-aa", "GPU-bb"]):
        monkeypatch.delenv(gpu_choice.VISIBLE, raising=False)
        gpu_choice.narrow_own_process(one_of(2, local_rank))
        assert os.environ[gpu_choice.VISIBLE] == uuid
    assert gpu_choice.chosen(["bb"]) == (0, "that of rank 1, 2 of 2 on this machine")
    monkeypatch.delenv(gpu_choice.VISIBLE)
    with pytest.raises(MachineError, match=r"^4 processes were started on this machine, which has 3 cards\. Start"):
        gpu_choice.narrow_own_process(one_of(4, 0))


@pytest.mark.parametrize(("named", "taken"), [("2, 0", ["2", "0"]), ("GPU-bb", ["GPU-bb"] * 2), ("", ["", ""])])
def test_of_cards_that_are_named_each_process_takes_one(smi, monkeypatch, named, taken) -> None:
    """One name is what a launcher gave this process; none is no card at all."""
    smi(ANSWER)
    for local_rank in range(2):
        monkeypatch.setenv(gpu_choice.VISIBLE, named)
        gpu_choice.narrow_own_process(one_of(2, local_rank))
        assert os.environ[gpu_choice.VISIBLE] == taken[local_rank]


def test_what_the_user_chose_stands(smi, monkeypatch: pytest.MonkeyPatch) -> None:
    smi(ANSWER)
    monkeypatch.setenv(gpu_choice.VISIBLE, "0")
    gpu_choice.narrow_own_process()
    assert os.environ[gpu_choice.VISIBLE] == "0"
    assert gpu_choice.chosen(["aa"]) == (0, "the one that CUDA_VISIBLE_DEVICES names")


def test_one_card_is_no_choice(smi) -> None:
    smi(ANSWER.splitlines(keepends=True)[1])
    gpu_choice.narrow_own_process()
    assert gpu_choice.VISIBLE not in os.environ
    assert gpu_choice.chosen(["bb"]) == (0, "the only CUDA card")


def test_a_card_that_takes_no_process_is_not_taken(smi) -> None:
    smi(ANSWER.replace("11900, 580.95.05, Default", "11900, 580.95.05, Prohibited"))
    assert gpu_choice.chosen(["aa", "bb"])[0] == 0


def test_cuda_and_the_driver_may_have_their_cards_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = MadeDriver([MadeCard(*RTX_4090, free=3 * GIB), MadeCard(*RTX_3060, free=11 * GIB)])
    driver.install(monkeypatch)
    assert [card.name for card in gpu_choice.ask_driver()] == [RTX_3060[0], RTX_4090[0]]
    assert gpu_choice.chosen([uuid_of(0), uuid_of(1)])[0] == 1


def test_where_the_driver_does_not_tell_the_first_is_taken_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    MadeDriver([MadeCard(*RTX_4090, free=3 * GIB)]).install(monkeypatch)
    index, why = gpu_choice.chosen([uuid_of(0), "of another"])
    assert index == 0
    assert why == "the first of 2 CUDA cards, whose free memory nvidia-smi does not tell"


@pytest.mark.parametrize("is_native", [True, False])
@pytest.mark.parametrize("given", [None, *gpu_choice.ALLOCATOR_SETTINGS])
def test_segments_grow_where_the_driver_can_and_the_user_says_nothing(
    given: str | None, is_native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = tmp_path / "version"
    if is_native:
        version.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05\n")
    monkeypatch.setattr(gpu_choice, "NATIVE_DRIVER", version)
    for name in gpu_choice.ALLOCATOR_SETTINGS:
        monkeypatch.setenv(name, "x")  # to be as it was, after the test
        monkeypatch.delenv(name)
    if given:
        monkeypatch.setenv(given, "backend:native")
    gpu_choice.let_segments_grow()
    said = {name: os.environ[name] for name in gpu_choice.ALLOCATOR_SETTINGS if name in os.environ}
    if given:
        assert said == {given: "backend:native"}
    else:
        assert said == ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} if is_native else {})


def test_the_command_line_settles_both_before_torch_is_loaded(tmp_path: Path) -> None:
    """In a process of its own, as torch is loaded in this one; and the library settles neither."""
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\ncat <<'END'\n{ANSWER}END\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    code = """
import os, sys
from pathlib import Path
from qtune import gpu_choice
gpu_choice.NATIVE_DRIVER = Path(os.devnull)
chosen = gpu_choice.let_segments_grow
def looked():
    chosen()
    print("torch" in sys.modules, os.environ["CUDA_VISIBLE_DEVICES"], os.environ["PYTORCH_CUDA_ALLOC_CONF"])
    raise SystemExit
from qtune.commands import terminal
terminal.let_segments_grow = looked
from qtune import cli
cli.main(["doctor"])
"""
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.split() == ["False", "GPU-bb", "expandable_segments:True"], done.stderr
