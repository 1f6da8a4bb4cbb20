"""Which kernel a card takes, what it is told, and what a forecast says that it holds; the card itself is not here."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import varlen

from qtune import accelerator
from qtune.accelerator import Capability
from qtune.memory import attention_kernels, memory_tracker, packed_attention
from qtune.memory.attention_kernels import Call, attend, kernel_of, needs_repeated_heads, spans_of, suits_varlen
from qtune.memory.memory_tracker import LiveBytes

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TURING, AMPERE, ADA, HOPPER = (7, 5), (8, 0), (8, 9), (9, 0)


def call(dtype: torch.dtype = BF16, heads: int = 32, key_heads: int = 8, width: int = 128, **others: Any) -> Call:
    return Call(dtype, heads, key_heads, width, **{"value_width": width, **others})


# From torch's sdp_utils.cpp: windows with grouped heads, wide heads, and every grouped model on an RTX 20xx ended in
# math attention, which writes the scores of all heads out in float32.
@pytest.mark.parametrize(
    ("asked", "card", "kernel", "is_repeated"),
    [
        (call(), ADA, "flash", False),
        (call(FP16), HOPPER, "flash", False),
        (call(has_band=True), ADA, "math", True),
        (call(has_band=True, key_heads=32), ADA, "memory-efficient", False),
        (call(width=256), ADA, "flash", False),
        (call(width=256, dropout=0.1), ADA, "math", True),
        (call(width=256, dropout=0.1), AMPERE, "flash", False),
        (call(width=208), ADA, "math", True),
        (call(width=208), HOPPER, "flash", False),
        (call(width=288), HOPPER, "math", True),
        (call(FP16), TURING, "math", True),
        (call(FP16, key_heads=32), TURING, "memory-efficient", False),
        (call(FP32), ADA, "math", True),
        (call(FP32, width=36, has_band=True), ADA, "math", True),
        (call(BF16, width=36, has_band=True), ADA, "math", False),  # nor can memory-efficient attention take it
        (call(BF16), TURING, "math", False),
        (call(torch.float64), ADA, "math", False),
        (call(width=192, value_width=128, key_heads=32), ADA, "memory-efficient", False),
    ],
)
def test_the_kernel_that_a_card_takes(asked: Call, card: Capability, kernel: str, is_repeated: bool) -> None:
    assert kernel_of(asked, card) == kernel
    assert needs_repeated_heads(asked, card) == is_repeated
    assert not needs_repeated_heads(asked, None)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Has the processor be taken for a card of the capability that it is called with."""
    monkeypatch.setattr(attention_kernels, "_tried_already", {})

    def of(capability: Capability) -> None:
        monkeypatch.setattr(accelerator, "capability", lambda device: capability)

    return of


def drawn(dtype: torch.dtype, tokens: int, key_heads: int = 2, width: int = 16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, tokens, width) for heads in (4, key_heads, key_heads)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def document(*rows: torch.Tensor, lengths: tuple[int, ...] | None, **settings: Any) -> list[torch.Tensor]:
    """The output and its gradients."""
    module = torch.nn.Module()
    module.num_key_value_groups = rows[0].shape[1] // rows[1].shape[1]
    output, _ = packed_attention.document_attention(module, *rows, None, document_lengths=lengths, **settings)
    return [output, *torch.autograd.grad(output.float().square().sum(), rows)]


@pytest.mark.parametrize("lengths", [None, (24,), (15, 9)])
@pytest.mark.parametrize("window", [None, 4])
def test_repeated_heads_are_the_same_attention(
    card: Any, monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, ...] | None, window: int | None
) -> None:
    """Packs, and rows without a mask, which transformers would leave grouped."""
    rows = drawn(FP32, 24)
    grouped = document(*rows, lengths=lengths, sliding_window=window)
    asked, original = [], torch.nn.functional.scaled_dot_product_attention

    def spy(query: torch.Tensor, key: torch.Tensor, *others: Any, **settings: Any) -> torch.Tensor:
        asked.append((query.shape[1], key.shape[1], settings.get("enable_gqa", False)))
        return original(query, key, *others, **settings)

    monkeypatch.setattr(attention_kernels, "scaled_dot_product_attention", spy)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    card(TURING)
    repeated = document(*rows, lengths=lengths, sliding_window=window)
    assert set(asked) == {(4, 4, False)}
    for one, other in zip(grouped, repeated, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def held(capability: Capability, dtype: torch.dtype, window: int | None, width: int = 64) -> tuple[int, int]:
    """Bytes that a document of 1,000 tokens keeps of attention, and the most that its backward pass adds."""
    tokens = 1000
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes(card=capability) as counter:
        query, key, value = (
            torch.empty(1, heads, tokens, width, dtype=dtype, requires_grad=True) for heads in (8, 2, 2)
        )
        before = sum(counter.held().values())
        band = None if window is None else attention_kernels.causal_band(tokens, window, query.device)
        output = attend(query, key, value, band, 0.0, None)
        del band
        kept = sum(counter.held().values()) - before
        gradient = output.detach()
        counter.enter_phase("backward")
        output.backward(gradient)
    return kept, counter.peaks["backward"].device_bytes - before - kept


QUERIES, KEYS, SUMS = 8 * 1000 * 64, 2 * 1000 * 64, 8 * 1000


def test_a_forecast_holds_what_memory_efficient_attention_does() -> None:
    """Keys and values of every query head, the output and a sum a query; backward a sum a query, the queries' gradient
    in float32 and in the end, and those of the repeated heads."""
    kept, added = held(TURING, FP16, None)
    assert kept == pytest.approx(2 * 3 * QUERIES + 4 * SUMS, rel=0.02)
    assert added == pytest.approx(4 * SUMS + 4 * QUERIES + 2 * 3 * QUERIES, rel=0.03)
    banded, added_by_band = held(TURING, FP16, 100)
    assert banded - kept == pytest.approx(2 * 1000 * 1000, rel=0.02)  # the window as a bias of 16 bits
    assert added_by_band == pytest.approx(added, rel=0.01)


def test_a_forecast_knows_math_attention_where_nothing_else_runs() -> None:
    scores = 8 * 1000 * 1000 * 4
    assert held(TURING, BF16, None)[0] > scores > 2 * sum(held(TURING, FP16, None))
    assert held(ADA, BF16, 100, width=36)[0] > scores


@pytest.mark.parametrize(
    ("lengths", "window", "bounds", "longest", "told"),
    [
        ((5, 9, 3), None, [0, 5, 14, 17], 9, (-1, 0)),
        ((5, 9, 3), 4, [0, 5, 14, 17], 9, (3, 0)),  # varlen_attn counts the tokens before, a window the token too
        ((5, 9, 3), 9, [0, 5, 14, 17], 9, (-1, 0)),
        ((30,), 4, [0, 30], 30, (3, 0)),
    ],
)
def test_what_varlen_is_told_of_a_pack(
    lengths: tuple[int, ...], window: int | None, bounds: list[int], longest: int, told: tuple[int, int]
) -> None:
    with torch.inference_mode():  # an answer may be what asks first, and a training pass keeps it
        spans = spans_of(lengths, window, torch.device("cpu"))
    assert not spans.bounds.is_inference()
    assert (spans.bounds.tolist(), spans.bounds.dtype) == (bounds, torch.int32)
    assert (spans.longest, spans.window) == (longest, told)


@pytest.mark.parametrize(
    ("asked", "lengths", "window", "card", "suits"),
    [
        (call(), (500, 300), None, ADA, True),
        (call(), (800,), 100, ADA, True),
        (call(), (800,), None, ADA, False),  # plain flash attention
        (call(), (800,), 800, ADA, False),
        (call(), (500, 300), None, None, False),
        (call(FP16), (500, 300), None, TURING, False),
        (call(FP32), (500, 300), None, ADA, False),
        (call(width=288), (500, 300), None, ADA, False),
        (call(width=36), (500, 300), None, ADA, False),
        (call(dropout=0.1), (500, 300), None, AMPERE, False),
        (call(), (24, 17), None, ADA, True),
        (call(), (63,) * 9, None, ADA, False),  # more blocks of rows than tokens
        (call(), (64,) * 9, None, ADA, True),
    ],
)
def test_which_packs_go_to_varlen(
    asked: Call, lengths: tuple[int, ...], window: int | None, card: Capability | None, suits: bool
) -> None:
    assert suits_varlen(asked, lengths, window, card) == suits


def test_a_varlen_without_windows_or_groups_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_an_older_torch(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False): ...

    monkeypatch.setattr(varlen, "varlen_attn", of_an_older_torch)
    assert not suits_varlen(call(), (500, 300), None, ADA)


def defined(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """torch's varlen_attn as its documentation says it, on any device; (T, H, E)."""
    assert cu_seq_q.dtype == torch.int32
    assert max_q == max_k == int(cu_seq_q.diff().max())
    assert enable_gqa == (query.shape[1] != key.shape[1])
    outputs = []
    for first, end in zip(cu_seq_q[:-1].tolist(), cu_seq_k[1:].tolist(), strict=True):
        q, k, v = (x[first:end].transpose(0, 1).float() for x in (query, key, value))
        k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
        distance = torch.arange(end - first)[:, None] - torch.arange(end - first)
        left, right = window_size
        seen = (distance >= -right) & ((distance <= left) | (left < 0))
        scores = q @ k.transpose(1, 2) * (scale or q.shape[-1] ** -0.5)
        outputs.append((scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs).to(query.dtype)


@pytest.mark.parametrize("lengths", [(30,), (15, 9, 6)])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("key_heads", [2, 4])
def test_documents_as_they_lie_are_the_same_attention(
    card: Any, monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, ...], window: int | None, key_heads: int
) -> None:
    rows, seen = drawn(BF16, 30, key_heads), []
    settings = {"lengths": lengths, "sliding_window": window, "scaling": 0.3}
    padded = document(*rows, **settings)

    def told(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(kwargs["window_size"])
        return defined(*args, **kwargs)

    monkeypatch.setattr(varlen, "varlen_attn", told)
    monkeypatch.setattr(attention_kernels, "has_varlen", lambda: True)
    card(ADA)
    lying = document(*rows, **settings)
    assert bool(seen) == (len(lengths) > 1 or window is not None)
    for one, other in zip(padded, lying, strict=True):
        torch.testing.assert_close(one, other, atol=0.02 * float(one.detach().abs().max()), rtol=0)
    assert attention_kernels.varlen_faults() == []


def of_documents(
    query: torch.Tensor, key: torch.Tensor, ends: torch.Tensor, scale: float | None, window: list[int]
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Where each document lies, and its scores (H, S, S)."""
    for first, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        q, k = (x[first:end].transpose(0, 1).float() for x in (query, key))
        distance = torch.arange(end - first)[:, None] - torch.arange(end - first)
        seen = (distance >= 0) & ((distance <= window[0]) | (window[0] < 0))
        scores = q @ k.repeat_interleave(len(q) // len(k), 0).transpose(1, 2) * (scale or q.shape[-1] ** -0.5)
        yield slice(first, end), scores.masked_fill(~seen, -torch.inf)


def lying_flash(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, scale=None, window_size=None, enable_gqa=False
):
    """torch_attn::_varlen_attn of torch 2.13: (T, H, E), and the sums' logarithms as (H, T)."""
    assert is_causal == (window_size == [-1, 0])
    output, sums = torch.empty_like(query), torch.empty(query.shape[1], len(query))
    for here, scores in of_documents(query, key, cu_seq_q, scale, window_size):
        sums[:, here] = scores.logsumexp(-1)
        values = value[here].transpose(0, 1).float().repeat_interleave(len(scores) // value.shape[1], 0)
        output[here] = (scores.softmax(-1) @ values).transpose(0, 1).to(query.dtype)
    return output, sums, None


def lying_flash_backward(
    grad_out, query, key, value, out, lse, cu_seq_q, cu_seq_k, max_q, max_k, is_causal, rng_state, scale=None,
    window_size=None,
):  # fmt: skip
    """torch_attn::_varlen_attn_backward: weights from the sums, and what they are held against from the output."""
    assert lse.is_contiguous()
    assert lse.shape == (query.shape[1], len(query))
    results = [torch.zeros(x.shape) for x in (query, key, value)]
    scale = scale or query.shape[-1] ** -0.5
    for here, scores in of_documents(query, key, cu_seq_q, scale, window_size):
        group = len(scores) // key.shape[1]
        q, k, v, o, g = (x[here].transpose(0, 1).float() for x in (query, key, value, out, grad_out))
        k, v = (x.repeat_interleave(group, 0) for x in (k, v))
        weights = (scores - lse[:, here, None]).exp()
        slopes = weights * (g @ v.transpose(1, 2) - (g * o).sum(-1, keepdim=True)) * scale
        parts = (slopes @ k, slopes.transpose(1, 2) @ q, weights.transpose(1, 2) @ g)
        for result, part in zip(results, parts, strict=True):
            result[here] = part.unflatten(0, (result.shape[1], -1)).sum(1).transpose(0, 1)
    return tuple(result.to(x.dtype) for result, x in zip(results, (query, key, value), strict=True))


@pytest.mark.parametrize("lengths", [(30,), (15, 9, 6)])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("is_wrong", [False, True])
def test_sinks_beside_documents_as_they_lie(
    card: Any, monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, ...], window: int | None, is_wrong: bool
) -> None:
    """In float32 the same is made by tiles, and so it is where the kernel turns out wrong."""
    sinks = torch.linspace(-1, 2, 4).requires_grad_()
    rows = drawn(BF16, 30)
    settings = {"document_lengths": lengths, "sliding_window": window, "scaling": 0.3, "s_aux": sinks}

    def made(rows: list[torch.Tensor]) -> list[torch.Tensor]:
        output, _ = packed_attention.document_attention(torch.nn.Module(), *rows, None, **settings)
        return [output, *torch.autograd.grad(output.float().square().sum(), [*rows, sinks])]

    exact, calls = made([row.detach().float().requires_grad_() for row in rows]), []

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["window_size"])
        output, sums, _ = lying_flash(*args, **kwargs)
        return output, sums + 0.5 * is_wrong, None

    monkeypatch.setattr(attention_kernels, "has_varlen", lambda: True)
    monkeypatch.setattr(torch.ops.torch_attn, "_varlen_attn", forward)
    monkeypatch.setattr(torch.ops.torch_attn, "_varlen_attn_backward", lying_flash_backward)
    card(ADA)
    lying = made(rows)
    assert len(calls) == (1 if is_wrong else 2)  # tried, and then run
    assert bool(attention_kernels.varlen_faults()) == is_wrong
    for one, other in zip(exact, lying, strict=True):
        torch.testing.assert_close(one, other.float(), atol=0.02 * float(one.detach().abs().max()), rtol=0)


@pytest.mark.parametrize("window", [None, 100])
def test_a_forecast_of_sinks_is_that_of_flash_attention(window: int | None) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes(card=ADA) as counter:
        rows = [torch.empty(1, heads, 1000, 64, dtype=BF16, requires_grad=True) for heads in (8, 2, 2)]
        before = sum(counter.held().values())
        output, _ = packed_attention.document_attention(
            torch.nn.Module(), *rows, None, document_lengths=(1000,), sliding_window=window, s_aux=torch.empty(8)
        )
        kept = sum(counter.held().values()) - before
    assert kept == pytest.approx(2 * QUERIES + 4 * SUMS, rel=0.01)
    assert output.shape == (1, 1000, 8, 64)


def test_a_forecast_of_tiles_holds_no_more_for_a_longer_row() -> None:
    """Beside what is kept: a token of a capped row costs the same, however long the row is."""

    def peak(tokens: int) -> float:
        with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes(card=ADA) as counter:
            rows = [torch.empty(1, heads, tokens, 64, dtype=BF16, requires_grad=True) for heads in (8, 2, 2)]
            output, _ = packed_attention.document_attention(
                torch.nn.Module(), *rows, None, document_lengths=(tokens,), softcap=50.0
            )
            output.backward(output.detach())
        return max(peak.device_bytes for peak in counter.peaks.values()) / tokens

    assert peak(32768) < peak(8192)


def refusing(*args: Any, **kwargs: Any) -> torch.Tensor:
    raise RuntimeError("no kernel image is available\nfor execution on the device")


def one_off(*args: Any, **kwargs: Any) -> torch.Tensor:
    left, right = kwargs["window_size"]
    return defined(*args, **{**kwargs, "window_size": (left if left < 0 else left + 1, right)})


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (refusing, "RuntimeError: no kernel image is available for execution on the device"),
        (one_off, "of the largest value"),
        (lambda *args, **kwargs: defined(*args, **kwargs) * torch.nan, "off by nan"),
    ],
)
def test_where_varlen_is_wrong_packs_are_padded_as_ever(
    card: Any, monkeypatch: pytest.MonkeyPatch, wrong: Any, why: str
) -> None:
    """Tried once, and nobody's random numbers are touched."""
    rows, tried = drawn(BF16, 30), []
    card(ADA)
    monkeypatch.setattr(attention_kernels, "has_varlen", lambda: False)
    padded = document(*rows, lengths=(15, 9, 6), sliding_window=4)

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        tried.append(args)
        return wrong(*args, **kwargs)

    monkeypatch.setattr(varlen, "varlen_attn", counted)
    monkeypatch.setattr(attention_kernels, "has_varlen", lambda: True)
    state = torch.get_rng_state()
    for _ in range(2):
        again = document(*rows, lengths=(15, 9, 6), sliding_window=4)
        assert all(torch.equal(one, other) for one, other in zip(padded, again, strict=True))
    assert len(tried) == 1
    assert torch.equal(state, torch.get_rng_state())
    (said,) = attention_kernels.varlen_faults()
    assert why in said


def test_memory_that_runs_out_says_nothing_of_varlen(card: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(varlen, "varlen_attn", full)
    monkeypatch.setattr(attention_kernels, "has_varlen", lambda: True)
    card(ADA)
    with pytest.raises(torch.OutOfMemoryError):
        document(*drawn(BF16, 30), lengths=(15, 9, 6))
    assert attention_kernels.varlen_faults() == []


def test_a_forecast_holds_documents_as_they_lie() -> None:
    """Queries, keys, values, the output and a sum a query; backward blocks of rows in float32, 128 more a document."""
    lengths, width = (600, 300, 100), 64
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes(card=ADA) as counter:
        rows = [torch.empty(1, heads, 1000, width, dtype=BF16, requires_grad=True) for heads in (8, 2, 2)]
        before = sum(counter.held().values())
        output, _ = packed_attention.document_attention(torch.nn.Module(), *rows, None, document_lengths=lengths)
        kept = sum(counter.held().values()) - before
        gradient = output.detach()
        counter.enter_phase("backward")
        output.backward(gradient)
    added = counter.peaks["backward"].device_bytes - before - kept
    assert kept == pytest.approx(2 * QUERIES + 4 * SUMS, rel=0.01)
    blocks = 4 * 8 * (1000 + 3 * 128) * (1 + 64)
    assert added == pytest.approx(blocks + 2 * 2 * QUERIES + 2 * QUERIES + 2 * 2 * KEYS, rel=0.01)
    assert memory_tracker.capability_for(torch.empty(1)) is None
