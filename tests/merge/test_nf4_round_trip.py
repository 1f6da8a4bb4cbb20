"""Weights through 4 bits and back, by rows: bitsandbytes' to the bit, whatever their shape, type and size."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from bitsandbytes.functional import get_4bit_type

from qtune.lock import Quantization
from qtune.merge import nf4_round_trip
from qtune.merge.nf4_round_trip import NF4Rows, restore_quantized, restored_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INTEGERS = {2: torch.int16, 4: torch.int32}


def quantization(double: bool = True, **changes: Any) -> Quantization:
    return replace(Quantization("nf4", double), **changes)


def assert_bitsandbytes_bits(weight: torch.Tensor, settings: Quantization, at_once: int = 3) -> None:
    """Asked for a few rows at a time; compared as integers, so that -0.0 is not 0.0."""
    rows = restored_rows(weight, weight.dtype, settings)
    found = torch.cat([rows(slice(start, start + at_once)) for start in range(0, len(weight), at_once)])
    found, whole = found.to(weight.dtype), found
    expected = restore_quantized(weight, settings)
    assert found.shape == weight.shape
    assert torch.equal(whole, found.to(whole.dtype))  # rounded already
    bits = INTEGERS[weight.dtype.itemsize]
    assert torch.equal(found.view(bits), expected.view(bits))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [(1, 64), (3, 64), (7, 128), (33, 192), (300, 1024), (1, 4096)], ids=str)
@pytest.mark.parametrize("size", [1e-40, 1e-20, 1e-6, 0.02, 1.0, 1e4, 1e30])
def test_random_weights(dtype, double, shape, size) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(shape).clamp(-4, 4) * min(size, torch.finfo(dtype).max / 8)).to(dtype)
    assert_bitsandbytes_bits(weight, quantization(double))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("double", [True, False])
def test_weights_on_a_border_and_one_step_beside_it(dtype, double) -> None:
    """The scale of every block is 1, so that borders and their neighbours stay where they are."""
    code = get_4bit_type("nf4", device="cpu")
    border = ((code[:-1] + code[1:]) / 2).to(dtype)
    beside = [torch.nextafter(border, torch.full_like(border, end)) for end in (-2.0, 2.0)]
    rows = torch.zeros(4, 64, dtype=dtype)
    for row, values in zip(rows, (border, *beside, code.to(dtype)), strict=True):
        row[: len(values)], row[-1] = values, 1.0
    assert_bitsandbytes_bits(torch.cat([rows, -rows]), quantization(double))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("double", [True, False])
def test_blocks_of_nothing_of_one_weight_and_of_extremes(dtype, double) -> None:
    weight = torch.zeros(6, 128, dtype=dtype)
    weight[1, 5] = -1.0
    weight[2] = torch.finfo(dtype).max / 4  # the mean of all scales is finite
    weight[3] = torch.finfo(dtype).tiny
    weight[4, ::2] = torch.finfo(dtype).smallest_normal / 4  # subnormal
    weight[5] = torch.linspace(-1, 1, 128)
    assert_bitsandbytes_bits(weight, quantization(double))


@pytest.mark.long  # bitsandbytes asks torch's compiler for these
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [(5, 63), (4, 96), (7, 1), (2, 100)], ids=str)
def test_rows_that_do_not_end_on_a_block_are_bitsandbytes_own(double, shape) -> None:
    torch.manual_seed(0)
    assert_bitsandbytes_bits(torch.randn(shape), quantization(double))


@pytest.mark.parametrize("changes", [{"type": "fp4"}, {"blocksize": 128}, {"quant_storage": "bfloat16"}], ids=str)
def test_other_ways_to_quantise(changes) -> None:
    torch.manual_seed(0)
    assert_bitsandbytes_bits(torch.randn(6, 256), quantization(**changes))


def test_it_is_rounded_from_the_compute_dtype(monkeypatch) -> None:
    """The run loaded a float32 checkpoint in bfloat16 before it quantised it."""
    torch.manual_seed(0)
    weight = torch.randn(64, 256)
    expected = restore_quantized(weight.to(torch.bfloat16), quantization())
    monkeypatch.setattr(nf4_round_trip, "WEIGHTS_AT_ONCE", 1024)
    assert torch.equal(restored_rows(weight, torch.bfloat16, quantization())(slice(0, 64)), expected.float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_no_number_stays_none(dtype) -> None:
    weight = torch.randn(3, 64)
    weight[1, 2], weight[2, 3] = torch.nan, torch.inf
    rows = NF4Rows.of(weight, dtype, 64, double=False).restored(slice(0, 3))
    assert [bool(torch.isfinite(row).all()) for row in rows] == [True, False, False]
