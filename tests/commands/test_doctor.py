"""What doctor says of a card, on a made-up driver; what it tries runs on the processor where that can do it."""

import ctypes
import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import bitsandbytes.functional
import pytest
import torch
from made_driver import RTX_3060, RTX_4090, MadeCard, MadeDriver

from qtune import accelerator, cli, gpu_choice
from qtune.accelerator import Capability
from qtune.commands import doctor
from qtune.hardware import Device
from qtune.memory import attention_kernels
from qtune.recipe.schema import Data, Model, Recipe
from qtune.units import GIB

CPU = Device("cpu", "CPU, 2 cores", 24 * GIB, 20 * GIB, "float32", "a test", 20 * GIB)


def card(capability: Capability = (8, 9), dtype: str = "bfloat16") -> Device:
    return Device("cuda:0", "RTX 4090", 24 * GIB, 20 * GIB, dtype, "the only CUDA card", capability=capability)


def rows_of(capsys: pytest.CaptureFixture) -> dict[str, dict[str, Any]]:
    return {row["what"]: row for row in json.loads(capsys.readouterr().out)}


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> MadeDriver:
    made = MadeDriver([MadeCard(*RTX_4090, free=20 * GIB, display="Enabled"), MadeCard(*RTX_3060, free=2 * GIB)])
    made.install(monkeypatch)
    monkeypatch.setattr(attention_kernels, "_tried_already", {})
    return made


def test_a_card_that_cannot_be_used_is_a_row_and_an_exit_code(driver: MadeDriver, capsys) -> None:
    driver.cards[0].fault = "CUDA error: CUDA-capable device(s) is/are busy or unavailable"
    assert cli.main(["doctor", "--json"]) == 2
    row = rows_of(capsys)["device"]
    assert (row["found"], row["is_fine"]) == ("cannot be used", False)
    assert "RTX 4090 is taken" in row["meaning"]


def test_every_row_of_a_card_is_there_even_if_nothing_on_it_works(driver: MadeDriver, capsys) -> None:
    """The processor's torch makes nothing on a card, which is as broken as one can be."""
    assert cli.main(["doctor", "--json"]) == 2
    rows = rows_of(capsys)
    assert rows["device"]["found"] == "NVIDIA GeForce RTX 4090, compute capability 8.9"
    assert "most free memory of 2 cards" in rows["device"]["meaning"]
    for what in ("4-bit weights", "memory limit", "page-locked memory"):
        assert not rows[what]["is_fine"], what
    assert rows["driver"]["found"] == "580.95.05"
    assert rows["card memory"]["meaning"].startswith("4.0 GiB are the desktop's and other programs'")
    assert (driver.current, driver.cards[0].fraction) == (0, 1.0)


def test_a_card_of_one_process_alone_is_said(driver: MadeDriver) -> None:
    driver.cards[0].mode = "Exclusive_Process"
    (row,) = doctor._driver(card())
    assert "a run and a chat cannot share it" in row.meaning


def test_four_bits_are_tried_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    row = doctor._four_bits(CPU)
    assert row.is_fine
    assert row.found == "work, largest error 0.145 of 1"  # a little less than half of what is between -1 and -0.696
    restore = bitsandbytes.functional.dequantize_4bit
    monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", lambda *given: restore(*given).flip(1))
    assert not doctor._four_bits(CPU).is_fine


def test_copies_are_timed_both_ways_and_what_is_not_locked_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "COPIED_BYTES", 1 << 20)
    to_device, from_device, is_locked = doctor.copy_rates(CPU)
    assert min(to_device, from_device) > 1e7
    assert is_locked
    assert "beside arithmetic" in doctor._copies(CPU).meaning

    def refused(count: int, dtype: torch.dtype) -> torch.Tensor:
        while accelerator._when_refused:
            accelerator._when_refused.pop()()
        return torch.empty(count, dtype=dtype)

    monkeypatch.setattr(accelerator, "page_locked", refused)
    row = doctor._copies(CPU)
    assert row.found.startswith("refused; ")
    assert "on top of arithmetic" in row.meaning


@pytest.mark.parametrize(("is_kept", "found"), [(True, "is kept"), (False, "is not kept")])
def test_the_limit_is_tried(is_kept: bool, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = []

    def taken(*given: object, **named: object) -> None:
        assert limits == [doctor.LIMIT_BYTES]
        if is_kept:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(accelerator, "hold_to", lambda place, most: limits.append(most) or limits.clear)
    monkeypatch.setattr(torch, "empty", taken)
    assert doctor._limit(card()).found == found
    assert limits == []


@pytest.mark.parametrize(
    ("capability", "dtype", "found"),
    [
        ((8, 9), "bfloat16", "flash; packs as they lie (varlen_attn)"),
        ((7, 5), "float16", "memory-efficient; packs padded to powers of two"),
    ],
)
def test_the_kernels_of_an_8b_llama(
    capability: Capability, dtype: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_kernels, "varlen_fault", lambda *_: None)
    row = doctor._attention(card(capability, dtype), None)
    assert row.found == found
    assert row.meaning.startswith("an 8B Llama: no score is ever written out")
    assert ("grouped heads are repeated" in row.meaning) == (capability == (7, 5))


def test_the_kernels_of_a_recipes_base(tiny_base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its heads are 16 wide, four of them and two of keys."""
    asked = []
    monkeypatch.setattr(attention_kernels, "varlen_fault", lambda call, *_: asked.append(call) or "RuntimeError: no")
    recipe = Recipe(name="t", model=Model(base=str(tiny_base)), data=Data(train="rows.jsonl"))
    row = doctor._attention(card(), recipe)
    assert (asked[0].heads, asked[0].key_heads, asked[0].width) == (4, 2, 16)
    assert row.found == "flash; packs padded, as varlen_attn fails (RuntimeError: no)"
    assert row.meaning.startswith(str(tiny_base))


@pytest.mark.parametrize(
    ("may_share", "found"), [(True, "safe"), (False, "not for card and processor at once"), (None, "not told")]
)
def test_paged_memory(may_share: bool | None, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "may_share_paged_memory", lambda place: may_share)
    row = doctor._paged_memory(card())
    assert row.found == found
    assert ("adamw_8bit" in row.meaning) == (may_share is not True)


@pytest.mark.parametrize(("value", "status", "expected"), [(1, 0, True), (0, 0, False), (1, 100, None)])
def test_the_driver_is_asked_about_paged_memory(
    value: int, status: int, expected: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def attribute(into: Any, number: int, handle: Any) -> int:
        asked.append((number, handle.value))
        into._obj.value = value
        return 0

    def device(into: Any, ordinal: int) -> int:
        into._obj.value = 40 + ordinal
        return status

    fake = SimpleNamespace(cuDeviceGet=device, cuDeviceGetAttribute=attribute)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: fake)
    assert accelerator.may_share_paged_memory(torch.device("cuda:1")) is expected
    assert asked == ([] if status else [(89, 41)])


def test_without_a_driver_nothing_is_told_of_paged_memory() -> None:
    assert accelerator.may_share_paged_memory(torch.device("cuda:0")) is None


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        (gpu_choice.GROWING, "grow"),
        ("max_split_size_mb:128,expandable_segments:True", "grow"),
        ("max_split_size_mb:128", "as max_split_size_mb:128 has it"),
        (None, "do not grow"),
    ],
)
def test_torchs_segments(settings: str | None, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in gpu_choice.ALLOCATOR_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    if settings:
        monkeypatch.setenv(gpu_choice.ALLOCATOR_SETTINGS[0], settings)
    assert doctor._allocator().found == found


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["medical", "--run", "somewhere"], "Give one of them"),
        (["--set", "lora.rank=4"], "have no effect without a recipe"),
        (["--demo"], "have no effect without a recipe"),
    ],
)
def test_what_has_no_effect_is_refused(arguments: list[str], told: str, capsys) -> None:
    assert cli.main(["doctor", *arguments]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("has_nccl", [True, False])
def test_several_cards_are_told_with_what_they_talk_over(has_nccl: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: has_nccl)
    name, total = RTX_4090
    one = gpu_choice.DriverCard("GPU-1", name, total, total, "580", gpu_choice.SHARED, False)
    small = replace(one, uuid="GPU-2", name=RTX_3060[0], free_bytes=RTX_3060[1])
    monkeypatch.setattr(gpu_choice, "ask_driver", lambda: (one, replace(one, uuid="GPU-3"), small))
    (row,) = doctor._several()
    said = "a run uses 2, which are alike; --cards 3 uses all, each by its speed; they talk over NCCL"
    assert row.meaning.startswith(said)
    assert ("not measured" in row.meaning, row.is_fine) == (has_nccl, has_nccl)
    monkeypatch.setattr(gpu_choice, "ask_driver", lambda: (one,))
    assert doctor._several() == []
