"""Compiled loops against the same in tensors; what they make of whole weights is in test_round_trip and
test_gguf_storage."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from qtune.merge import kernels

NOWHERE_TO_KEEP = """\
import numba.core.caching
numba.core.caching.CacheImpl._locator_classes = []
import torch
from qtune.merge.kernels import largest_sizes
print(largest_sizes(torch.tensor([[1.0, -3.0], [0.5, 0.25]])).tolist())
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_largest_sizes(dtype) -> None:
    torch.manual_seed(0)
    blocks = torch.randn(50, 24).to(dtype)
    blocks[3] = -0.0
    blocks[4, 5], blocks[5, 6] = torch.nan, -torch.inf
    found = kernels.largest_sizes(blocks)
    torch.testing.assert_close(found, blocks.abs().amax(-1), rtol=0, atol=0, equal_nan=True)
    assert found.isnan().sum() == 1


def test_the_largest_error_is_over_what_each_may_be_off() -> None:
    torch.manual_seed(0)
    wanted = torch.randn(1000)
    found = wanted + 0.01 * torch.randn(1000)
    expected = ((found - wanted).abs() / (wanted.abs() * 0.1 + 0.02)).max()
    limits = np.float32(0.1), np.float32(0.02)
    assert kernels.largest_error(found.numpy(), wanted.numpy(), *limits) == pytest.approx(float(expected), rel=1e-6)
    assert kernels.largest_error(wanted.numpy(), wanted.numpy(), *limits) == 0


@pytest.mark.parametrize("spoilt", [torch.nan, torch.inf])
def test_an_error_that_is_no_number_is_above_every_bound(spoilt) -> None:
    wanted = torch.ones(1000)
    found = wanted.clone()
    found[7] = spoilt
    assert not kernels.largest_error(found.numpy(), wanted.numpy(), np.float32(1), np.float32(1)) <= 1


def test_sums_of_squares() -> None:
    torch.manual_seed(0)
    original, held, start, merged = torch.randn(4, 1 << 19)
    found = kernels.squares(*(each.numpy() for each in (original, held, start, merged)))
    expected = [float(each.double().square().sum()) for each in (original, merged - start, held - original)]
    assert list(found) == pytest.approx(expected, rel=1e-5)


@pytest.mark.long
def test_they_run_where_machine_code_cannot_be_kept() -> None:
    done = subprocess.run([sys.executable, "-c", NOWHERE_TO_KEEP], capture_output=True, text=True, check=False)
    assert done.stdout == "[3.0, 0.5]\n", done.stderr
