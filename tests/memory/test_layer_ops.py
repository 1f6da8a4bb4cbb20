"""A norm, a rotary embedding and a gated product as one operation: transformers' values, gradients as in float64, and
no more kept than must be. Each is run by torch, and as on a card, where Triton's kernels are interpreted."""

import functools
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.activations import ACT2FN
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from qtune.memory import layer_ops
from qtune.memory.layer_ops import ACTIVATIONS, gated, rms_norm, rotary
from qtune.memory.memory_tracker import LiveBytes

EPSILON = 1e-5
ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
SHAPES = [(1, 1), (1, 5, 7), (3, 33), (2, 3, 2, 64), (1, 0, 16)]
NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


@pytest.fixture(params=["torch", "card", "triton"])
def on(request, monkeypatch):
    """How the operations run: by torch's; as on a card, without Triton; by Triton's kernels."""
    monkeypatch.setattr(layer_ops, "PIECE_ELEMENTS", 64)  # several pieces of a norm
    if request.param != "torch":
        monkeypatch.setattr(layer_ops, "_is_on_card", lambda x: True)
    if request.param == "triton":
        kernels = pytest.importorskip("qtune.memory.triton_kernels")
        monkeypatch.setattr(layer_ops, "_kernels", lambda device: kernels)
    return request.param


def widths(on: str) -> list[torch.dtype]:
    """Triton's kernels compute in float32, whatever they are given."""
    return [torch.float32, torch.bfloat16] if on == "triton" else list(ROUNDING)


def random(*shape: int, dtype=torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, laid out with the first dimension innermost but one."""
    return tensor.transpose(0, -2).contiguous().transpose(0, -2) if tensor.ndim > 1 else tensor


def passed(run, inputs: list[torch.Tensor], gradient: torch.Tensor) -> list[torch.Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    value = run(*leaves)
    value.backward(gradient.to(value.dtype))
    return [value.detach(), *(leaf.grad for leaf in leaves)]


def assert_rounded(ours: list[torch.Tensor], exact: list[torch.Tensor], dtype: torch.dtype) -> None:
    for mine, wanted in zip(ours, exact, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), wanted, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])


def norm_in_float64(weight: torch.Tensor, is_offset: bool):
    scale = weight.double() + is_offset
    return lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPSILON) * scale


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("is_offset", [False, True])
def test_a_norm_and_its_gradient_are_those_of_float64(on, shape, is_offset) -> None:
    for dtype in widths(on):
        x, gradient, weight = (random(*s, dtype=dtype, seed=n) for n, s in enumerate((shape, shape, shape[-1:])))
        exact = passed(norm_in_float64(weight, is_offset), [x.double()], gradient.double())
        for layout in (lambda t: t, strided):
            run = functools.partial(rms_norm, weight=weight, epsilon=EPSILON, is_offset=is_offset)
            assert_rounded(passed(run, [layout(x)], layout(gradient)), exact, dtype)


@pytest.mark.parametrize("theirs", [LlamaRMSNorm, Gemma3RMSNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_gives_the_very_values_of_its_class(theirs, dtype) -> None:
    norm = theirs(33, EPSILON).to(dtype)
    norm.weight.data = random(33, dtype=dtype)
    x = 100 * random(2, 9000, 33, dtype=dtype)  # several pieces
    with torch.no_grad():
        assert torch.equal(rms_norm(x, norm.weight, EPSILON, theirs is Gemma3RMSNorm), norm(x))


def rotated_by_theirs(cos: torch.Tensor, sin: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return apply_rotary_pos_emb(x, x, cos.to(x.dtype), sin.to(x.dtype))[0]


@pytest.mark.parametrize("width", [2, 6, 32])
@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_a_rotation_and_its_gradient_are_those_of_transformers(on, width, tokens) -> None:
    """Also where the halves of the angles are not alike, and for queries as attention has them, heads behind tokens."""
    for dtype in widths(on):
        x, gradient = (random(2, tokens, 3, width, dtype=dtype, seed=n).transpose(1, 2) for n in (0, 1))
        for batch in (1, 2):
            cos, sin = (random(batch, tokens, width, dtype=dtype, seed=n) for n in (2, 3))
            exact = passed(functools.partial(rotated_by_theirs, cos, sin), [x.double()], gradient.double())
            for layout in (lambda t: t, lambda t: t.contiguous(), lambda t: torch.cat([t, t], -1)[..., :width]):
                run = functools.partial(rotary, cos=cos, sin=sin)
                ours = passed(run, [layout(x)], layout(gradient))
                assert_rounded(ours, exact, dtype)
            if on != "triton":
                theirs = passed(functools.partial(rotated_by_theirs, cos, sin), [x], gradient)
                assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_gated_product_and_its_gradients_are_those_of_transformers(on, activation, shape) -> None:
    theirs = lambda gate, up: ACT2FN[NAMES[activation]](gate) * up  # noqa: E731
    for dtype in widths(on):
        gate, up, gradient = (random(*shape, dtype=dtype, seed=n) for n in range(3))
        exact = passed(theirs, [gate.double(), up.double()], gradient.double())
        for layout in (strided, lambda t: t):
            inputs = [layout(gate), layout(up)]
            ours = passed(lambda a, b: gated(a, b, activation), inputs, layout(gradient))
            assert_rounded(ours, exact, dtype)
        if on != "triton":
            same = passed(theirs, [gate, up], gradient)
            assert all(torch.equal(a, b) for a, b in zip(ours, same, strict=True))


def test_the_product_comes_with_its_gradients(on) -> None:
    gate, up, gradient = (random(3, 7, dtype=torch.float32, seed=n) for n in range(3))
    *_, product = layer_ops.gated_gradients(gradient, gate, up, "silu")
    torch.testing.assert_close(product, gated(gate, up, "silu"))


def test_gradients_by_finite_differences() -> None:
    x, weight = random(3, 5).requires_grad_(), random(5)
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, weight, EPSILON, True), (x,))
    q, angles = random(1, 2, 3, 6).requires_grad_(), random(1, 3, 6)
    assert torch.autograd.gradcheck(lambda q: rotary(q, angles, -angles), (q,))
    for activation in ACTIVATIONS:
        pair = (random(3, 5).requires_grad_(), random(3, 5, seed=1).requires_grad_())
        assert torch.autograd.gradcheck(lambda a, b, kind=activation: gated(a, b, kind), pair)


@pytest.mark.parametrize("card", [None, (8, 9)])
def test_what_is_kept(card) -> None:
    """Of a norm its input and four bytes a row, of a rotation nothing, of a gated product gate and up."""
    rows, width, units = 64, 512, 64 * 512 * 2
    with FakeTensorMode(), LiveBytes(card=card) as counter:
        x, gate, up = (torch.zeros(1, 1, rows, width, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        weight, angles = (torch.ones(n, width, dtype=torch.bfloat16) for n in (1, rows))
        begun = sum(counter.held().values())
        for run, kept in (
            (lambda: rms_norm(x, weight[0], EPSILON, False), 4 * rows),
            (lambda: rotary(x, angles[None], angles[None]), 0),
            (lambda: gated(gate, up, "silu"), 0),
        ):
            output = run()
            assert sum(counter.held().values()) - begun == units + math.ceil(kept / 512) * 512
            output.sum().backward()
            x.grad = gate.grad = up.grad = output = None
            assert sum(counter.held().values()) == begun


def full(*_: object) -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_kernels_that_are_wrong_or_missing_are_not_taken(monkeypatch) -> None:
    kernels = pytest.importorskip("qtune.memory.triton_kernels")
    here = torch.device("cpu")
    layer_ops._kernels.cache_clear()
    assert layer_ops._kernels(here) is None
    monkeypatch.setattr(layer_ops.accelerator, "is_card", lambda device: True)
    try:
        layer_ops._kernels.cache_clear()
        assert layer_ops._kernels(here) is kernels
        for fault in (lambda gate, up, activation: gate + up, lambda *_: 1 / 0):
            layer_ops._kernels.cache_clear()
            with monkeypatch.context() as patch:
                patch.setattr(kernels, "gated", fault)
                assert layer_ops._kernels(here) is None
        layer_ops._kernels.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "gated", full)
            with pytest.raises(torch.OutOfMemoryError):
                layer_ops._kernels(here)
        assert layer_ops._kernels(here) is kernels
    finally:
        layer_ops._kernels.cache_clear()
