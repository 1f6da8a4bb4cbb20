"""Parts of an NF4 weight: the bits of the same part of the whole, dequantised."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit

from qtune.memory.memory_tracker import quantization_state, storage_sizes
from qtune.memory.nf4 import BLOCK, empty_packed, is_quantized, rows_fall_on_blocks, weight_rows


def packed(rows: int, columns: int, double: bool, dtype: torch.dtype = torch.float32) -> Linear4bit:
    torch.manual_seed(0)
    linear = Linear4bit(columns, rows, bias=False, compute_dtype=dtype, compress_statistics=double, quant_type="nf4")
    weight = torch.randn(rows, columns, dtype=dtype)
    linear.weight = Params4bit(weight, False, compress_statistics=double, quant_type="nf4").to("cpu")
    return linear


def whole(linear: Linear4bit) -> torch.Tensor:
    """(rows, columns) by one long row: bitsandbytes 0.50 on the CPU misreads rows that 16 divides and 64 does not."""
    state = linear.weight.quant_state
    shape, state.shape = state.shape, torch.Size((state.shape.numel(),))
    flat = dequantize_4bit(linear.weight.data, state)
    state.shape = shape
    return flat.view(shape)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [64, 128, 172, 200, pytest.param(7, marks=pytest.mark.long)])
def test_rows_are_rows_of_the_whole(columns, dtype, double) -> None:
    rows = 330  # the scales of 7 to 1024 blocks, so that a part can start inside a block of scales
    linear = packed(rows, columns, double, dtype)
    expected = whole(linear)
    cuts = [n for n in range(rows + 1) if n * columns % BLOCK == 0]
    for start, stop in [(0, rows), *pairwise(cuts[::9]), (cuts[0], cuts[-1]), (cuts[-1], rows)]:
        if start < stop:
            assert torch.equal(weight_rows(linear, slice(start, stop), dtype), expected[start:stop]), (start, stop)


@pytest.mark.parametrize("columns", [16, 48, 96])
def test_parts_of_widths_that_bitsandbytes_misreads_on_the_cpu_are_right(columns) -> None:
    linear = packed(256, columns, True)
    assert torch.equal(weight_rows(linear, slice(64, 192), torch.float32), whole(linear)[64:192])


@pytest.mark.parametrize("columns", [16, 48, 96])
@pytest.mark.parametrize("is_trained", [True, False])
def test_products_of_such_widths_are_right_whoever_calls_the_kernel(columns, is_trained) -> None:
    """Such a base was trained, scored and merged with other weights on the CPU than a card has, and nothing said so."""
    linear = packed(64, columns, True)
    x = torch.randn(3, columns, requires_grad=is_trained)
    torch.testing.assert_close(linear(x), x @ whole(linear).T)
    assert torch.equal(dequantize_4bit(linear.weight.data, linear.weight.quant_state), whole(linear))


def test_a_part_comes_in_the_dtype_asked_for() -> None:
    linear = packed(128, 64, True, torch.bfloat16)
    assert weight_rows(linear, slice(0, 128), torch.float32).dtype == torch.float32
    assert weight_rows(linear, slice(64, 128), torch.float32).dtype == torch.float32


def test_a_plain_weight_is_sliced() -> None:
    linear = torch.nn.Linear(7, 5)
    assert torch.equal(weight_rows(linear, slice(1, 4), torch.float64), linear.weight[1:4].double())
    assert not is_quantized(linear)
    assert rows_fall_on_blocks(linear, 3)


def test_which_rows_start_a_block() -> None:
    assert is_quantized(packed(8, 172, True))
    assert rows_fall_on_blocks(packed(32, 172, True), 16)
    assert not rows_fall_on_blocks(packed(32, 172, True), 8)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [(172, 64), (64, 172), (5, 13), (1000, 640)])
def test_an_empty_one_is_laid_out_as_bitsandbytes_does(shape, double) -> None:
    data, state = quantize_4bit(torch.randn(shape), quant_type="nf4", compress_statistics=double)
    real, empty = SimpleNamespace(quant_state=state), empty_packed(shape, torch.float32, double)
    assert (empty.shape, empty.dtype) == (data.shape, data.dtype)
    sizes = [[(t.numel(), t.dtype) for t in quantization_state([each])] for each in (real, empty)]
    assert sizes[0] == sizes[1]
    assert storage_sizes(quantization_state([real])) == storage_sizes(quantization_state([empty]))
    assert empty.quant_state.nested == state.nested
