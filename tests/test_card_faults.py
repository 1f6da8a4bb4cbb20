"""Cards that cannot be used, or can be no longer: what CUDA raises, and what is said."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from made_driver import RTX_3060, RTX_4090, MadeCard, MadeDriver
from real_steps import recipe_for
from stopped_runs import before_step, checkpoints, qtune, write_recipe

from qtune import card_faults, hardware
from qtune import run as story
from qtune.commands import doctor
from qtune.errors import MachineError
from qtune.model import base
from qtune.plan.planner import decide
from qtune.plan.workload import Work
from qtune.train import loop
from qtune.train.checkpointer import Saver
from qtune.units import GIB, MIB

BUILT = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
BUSY = "CUDA error: CUDA-capable device(s) is/are busy or unavailable\nCUDA kernel errors might be asynchronous"
OLD_DRIVER = "The NVIDIA driver on your system is too old (found version 12040). Please update your GPU driver"
LAUNCH = "CUDA error: unspecified launch failure\nSearch for `cudaErrorLaunchFailure' in the CUDA documentation."


@pytest.mark.parametrize(
    ("capability", "built"),
    [
        ((7, 5), BUILT),
        ((8, 9), BUILT),  # by 8.6's, as all of a generation run what is built for one before
        ((8, 7), BUILT),
        ((12, 1), BUILT),
        ((13, 0), BUILT),  # compiled from 12.0's when it is loaded
        ((9, 0), ["sm_90a"]),
        ((6, 1), []),  # a build that does not say
    ],
)
def test_a_card_that_this_torch_has_kernels_for_is_let_through(capability: tuple[int, int], built: list[str]) -> None:
    card_faults.refuse_too_old("a card", capability, built)


@pytest.mark.parametrize(
    ("capability", "built", "told"),
    [
        (
            (6, 1),
            BUILT,
            "GTX 1080 is older than what this torch, .* capability is 6.1, and they begin at 7.5",
        ),
        ((7, 0), BUILT, "Install an older torch"),
        ((8, 0), ["sm_86", "sm_90"], "older"),
        ((12, 0), ["sm_80", "sm_90"], "newer than what this torch, .* Install a newer torch"),
    ],
)
def test_a_card_without_kernels_is_refused(capability: tuple[int, int], built: list[str], told: str) -> None:
    with pytest.raises(MachineError, match=told):
        card_faults.refuse_too_old("GTX 1080", capability, built)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> MadeDriver:
    made = MadeDriver([MadeCard(*RTX_4090, free=20 * GIB)])
    made.install(monkeypatch)
    return made


def test_a_card_that_is_too_old_is_refused_before_it_is_touched(driver: MadeDriver) -> None:
    driver.cards[0].capability = (6, 1)
    with pytest.raises(MachineError, match=r"RTX 4090 is older .* CUDA_VISIBLE_DEVICES= in the environment"):
        hardware.find_device()
    assert not driver.cards[0].has_context


@pytest.mark.parametrize("mode", ["Default", "Exclusive_Process"])
def test_a_card_that_another_process_has_is_refused(driver: MadeDriver, mode: str) -> None:
    driver.cards[0].fault, driver.cards[0].mode = BUSY, mode
    with pytest.raises(MachineError, match=r"RTX 4090 is taken: others have it") as refused:
        hardware.find_device()
    assert ("lets in one process alone" in str(refused.value)) == (mode != "Default")
    assert refused.value.exit_code == 2


def test_a_card_that_is_full_is_refused(driver: MadeDriver) -> None:
    driver.cards[0].fault = "CUDA error: out of memory"
    with pytest.raises(MachineError, match="has no memory left for CUDA to begin with"):
        hardware.find_device()


def test_another_fault_is_left_as_it_is(driver: MadeDriver) -> None:
    driver.cards[0].fault = "CUDA error: an illegal memory access was encountered"
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        hardware.find_device()


def failing(message: str):
    def init() -> None:
        raise RuntimeError(message)

    return init


def test_a_driver_that_is_too_old_is_no_reason_for_the_processor(
    driver: MadeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch sees no card then, and says why when it is told to begin."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", failing(OLD_DRIVER))
    with pytest.raises(MachineError, match=r"NVIDIA driver is too old for this torch, .* built for CUDA 13\.0"):
        hardware.find_device()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert hardware.find_device().name == "cpu"


@pytest.mark.parametrize("message", ["No CUDA GPUs are available", "Found no NVIDIA driver on your system."])
def test_a_machine_without_a_card_takes_its_processor(
    driver: MadeDriver, monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", failing(message))
    assert hardware.find_device().name == "cpu"


def test_the_context_is_what_the_driver_has_less_of(driver: MadeDriver) -> None:
    """Of the plan it is part, with the kernels that come later; what is free is so without it."""
    driver.cards[0].context = 420 * MIB
    device = hardware.find_device()
    assert device.outside_bytes == 420 * MIB + hardware.LATER_KERNEL_BYTES
    assert device.free_bytes == 20 * GIB
    assert hardware.find_device() == device  # the second time it is there already


def test_a_context_that_was_there_before_is_assumed(driver: MadeDriver) -> None:
    driver.cards[0].has_context = True
    device = hardware.find_device()
    assert device.outside_bytes == hardware.ASSUMED_CONTEXT_BYTES
    assert device.free_bytes == driver.cards[0].left + hardware.ASSUMED_CONTEXT_BYTES - hardware.LATER_KERNEL_BYTES


def test_a_card_that_falls_out_names_the_checkpoint_that_is_kept(tiny_base: Path, tmp_path: Path, capsys) -> None:
    """From then on whatever asks it fails, so that the adapter cannot be saved either."""

    def fall_out(*arguments: object) -> None:
        raise torch.AcceleratorError(LAUNCH)

    recipe, run = write_recipe(tmp_path, tiny_base, memory={"budget": "2GiB"}), tmp_path / "run"

    def at_once() -> None:
        patch.setattr(Saver, "save_adapter", fall_out)
        fall_out()

    prepared = []
    with pytest.MonkeyPatch.context() as patch, before_step(6, at_once):
        patch.setattr(story, "prepare", lambda device, most: prepared.append((device.name, most)))
        assert qtune("run", recipe, "--output", run) == 2
    assert prepared == [("cpu", 2 * GIB)]  # and the device was made ready before, with the budget
    said = capsys.readouterr().err
    assert "fell out in the middle (CUDA error: unspecified launch failure)" in said
    assert f"The newest checkpoint is kept: {run}/checkpoints/step-00000004" in said
    assert f"qtune resume {run}" in said
    assert checkpoints(run)[-1] == 4


@pytest.mark.parametrize(
    ("fault", "is_gone"),
    [
        (torch.AcceleratorError(LAUNCH), True),
        (torch.AcceleratorError("CUDA error: uncorrectable NVLink ECC error encountered"), True),
        (torch.AcceleratorError("CUDA error: unknown error"), True),
        (torch.AcceleratorError("CUDA error: out of memory"), False),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("unknown error"), False),
        (ValueError("CUDA error: unknown error"), False),
    ],
)
def test_what_is_a_card_that_is_gone(fault: Exception, is_gone: bool) -> None:
    assert (card_faults.why_gone(fault) is not None) == is_gone
    later = OSError("the adapter cannot be saved")
    later.__context__ = fault
    assert (card_faults.why_gone(later) is not None) == is_gone


def test_of_two_cards_one_that_is_small_and_free_is_named_in_the_plan(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    MadeDriver([MadeCard(*RTX_4090, free=3 * GIB), MadeCard(*RTX_3060, free=11 * GIB)]).install(monkeypatch)
    recipe = recipe_for(tiny_base)
    plan = decide(recipe, hardware.find_device(), base.read_config(recipe.model), Work.of_full_sequences(64))
    told = next(choice for choice in plan.choices if choice.name == "device")
    assert told.value == RTX_3060[0]
    assert told.reason == "most free memory of 2 cards; the others: NVIDIA GeForce RTX 4090 3.0 GiB"


@pytest.mark.parametrize(("said", "code"), [(LAUNCH, 2), ("CUDA error: an illegal memory access was encountered", 1)])
def test_a_card_that_falls_out_of_another_verb_is_not_our_fault(
    said: str, code: int, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fall_out(*arguments: object) -> None:
        raise torch.AcceleratorError(said)

    monkeypatch.setattr(doctor, "examine", fall_out)
    assert qtune("doctor") == code
    assert ("The card fell out in the middle" in capsys.readouterr().err) == (code == 2)


def test_training_goes_to_the_chosen_card_after_transformers_went_to_the_first(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_for(tiny_base)
    plan = decide(recipe, hardware.find_device(), base.read_config(recipe.model), Work.of_full_sequences(64))
    driver = MadeDriver([MadeCard(*RTX_4090, free=3 * GIB), MadeCard(*RTX_3060, free=11 * GIB)])
    driver.install(monkeypatch)
    device = hardware.find_device()
    with hardware.as_it_was():
        hardware.prepare(device)
        session: Any = loop.TrainingSession(recipe, replace(plan, device=device), *[None] * 3)
        assert str(session._settings().device) == "cuda:1"
        assert driver.current == 1
    assert driver.current == 0
