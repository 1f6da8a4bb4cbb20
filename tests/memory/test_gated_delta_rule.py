"""The gated delta rule by chunks is the rule token by token, forward and backward, and is what a model runs by."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import tiny_config
from crossed import crossed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    KimiLinearConfig,
    KimiLinearForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
)
from transformers.models.kimi_linear import modeling_kimi_linear
from transformers.models.qwen3_5 import modeling_qwen3_5

from qtune.memory import gated_delta_rule
from qtune.memory.gated_delta_rule import CHUNK, _Carried, chunk_gated_delta_rule
from qtune.memory.memory_tracker import LiveBytes

Inputs = tuple[torch.Tensor, ...]


def inputs(rows: int, tokens: int, dtype: torch.dtype = torch.float32, by_channel: bool = False) -> Inputs:
    """Queries, keys, values, decays, rates: two heads of keys for four of values, keys of 8 and values of 12.

    Decays by channel are as strong as exp(-30) and as weak as none, as Kimi's are.
    """
    draw = torch.Generator().manual_seed(tokens)
    shapes = [(rows, tokens, 2, 8)] * 2 + [(rows, tokens, 4, 12)] + [(rows, tokens, 4)] * 2
    if by_channel:
        shapes[:2], shapes[3] = [(rows, tokens, 4, 8)] * 2, (rows, tokens, 4, 8)
    query, key, value, decay, rate = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes)
    decay = -decay.square() if not by_channel else -(3 * decay - 2).exp().clamp(max=30)
    return tuple(each.to(dtype).requires_grad_() for each in (query, key, value, decay, rate.sigmoid()))


def token_by_token(row: Inputs, state: torch.Tensor, is_normed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The rule as it is defined, in the inputs' precision."""
    query, key, value, decay, rate = row
    if is_normed:
        query, key = (each / (each.square().sum(-1, keepdim=True) + 1e-6).sqrt() for each in (query, key))
    shared = value.shape[2] // key.shape[2]
    query, key = (each.repeat_interleave(shared, 2) for each in (query * query.shape[-1] ** -0.5, key))
    decay = decay if decay.ndim == 4 else decay[..., None]
    outputs = []
    for t in range(value.shape[1]):
        state = state * decay[:, t].exp()[..., None]
        wrong = value[:, t] - (key[:, t].unsqueeze(2) @ state).squeeze(2)
        state = state + key[:, t].unsqueeze(3) * (rate[:, t].unsqueeze(2) * wrong).unsqueeze(2)
        outputs.append((query[:, t].unsqueeze(2) @ state).squeeze(2))
    return torch.stack(outputs, 1), state


@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (2, CHUNK - 1), (1, CHUNK), (3, CHUNK + 1), (1, 3 * CHUNK - 5)])
@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize("segment_bytes", [gated_delta_rule.SEGMENT_BYTES, 1_500_000, 1])
def test_it_is_the_rule_token_by_token(
    rows: int, tokens: int, begins: bool, by_channel: bool, segment_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once; two chunks of a row, or a chunk of two rows at a time; and one chunk of one row."""
    monkeypatch.setattr(gated_delta_rule, "SEGMENT_BYTES", segment_bytes)
    exact, ours = (inputs(rows, tokens, dtype, by_channel) for dtype in (torch.float64, torch.float32))
    state = torch.zeros(rows, 4, 8, 12) if begins else torch.randn(rows, 4, 8, 12)
    wanted, last = token_by_token(exact, state.double(), is_normed=True)
    outputs, kept = chunk_gated_delta_rule(
        *ours, initial_state=None if begins else state, output_final_state=True, use_qk_l2norm_in_kernel=True
    )
    assert kept is not None
    rounding = 10 if by_channel else 1  # of sums of such decays, which are in the hundreds; transformers' is the same
    torch.testing.assert_close(outputs.double(), wanted, rtol=1e-5, atol=1e-5 * rounding)
    torch.testing.assert_close(kept.double(), last, rtol=1e-5, atol=1e-5 * rounding)
    weights = torch.randn(wanted.shape, dtype=torch.float64)
    expected = torch.autograd.grad((wanted * weights).sum() + last.square().sum(), exact)
    found = torch.autograd.grad((outputs * weights).sum() + kept.double().square().sum(), ours)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=3e-5 * rounding)


@pytest.mark.parametrize(
    ("rows", "tokens", "by_channel"), crossed([(1, 64 * CHUNK), (48, CHUNK), (6, 8 * CHUNK - 3)], [False, True])
)
def test_no_more_is_held_than_of_a_segment(
    rows: int, tokens: int, by_channel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside what it is given, its gradients, the outputs and theirs. It was 10 times as much."""
    monkeypatch.setattr(gated_delta_rule, "SEGMENT_BYTES", 3_000_000)
    with FakeTensorMode(), LiveBytes() as counter:
        row = inputs(rows, tokens, by_channel=by_channel)
        counter.enter_phase("given")
        outputs, _ = chunk_gated_delta_rule(*row, use_qk_l2norm_in_kernel=True)
        of_outputs = torch.empty_like(outputs)
        given = 2 * sum(each.nbytes for each in (*row, outputs))
        counter.enter_phase("back")
        torch.autograd.grad(outputs, row, of_outputs)
    assert sum(counter.peaks["back"].device.values()) < given + gated_delta_rule.SEGMENT_BYTES


def test_the_way_back_from_chunk_to_chunk() -> None:
    shapes = [(2, 3, 5, 4), (2, 3, 5, 6), (2, 3, 5, 6), (2, 3, 1, 1), (2, 6, 4)]
    given = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(_Carried.apply, given)


class Operations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += 1
        return operation(*args, **(kwargs or {}))


def operations(rule: Callable[..., Any], row: Inputs) -> int:
    with Operations() as counted:
        outputs, _ = rule(*row, use_qk_l2norm_in_kernel=True)
        torch.autograd.grad(outputs.sum(), row)
    return counted.count


def test_it_takes_fewer_operations_than_transformers_does() -> None:
    """Per chunk 8 and 14 with their views, of 100: what a card would have to launch, and a plan to go through."""
    short, long = inputs(1, 4 * CHUNK), inputs(1, 12 * CHUNK)
    ours = [operations(chunk_gated_delta_rule, row) for row in (short, long)]
    theirs = [operations(modeling_qwen3_5.torch_chunk_gated_delta_rule, row) for row in (short, long)]
    assert (ours[1] - ours[0]) / 8 < 0.3 * (theirs[1] - theirs[0]) / 8


def peak_bytes(rule: Callable[..., Any], row: Inputs) -> int:
    query, key, value, decay, rate = row
    with LiveBytes() as counter:
        outputs, _ = rule(query, key, value, g=decay, beta=rate, use_qk_l2norm_in_kernel=True)
        torch.autograd.grad(outputs.sum(), row)
    return max(sum(peak.device.values()) for peak in counter.peaks.values())


def test_channels_that_decay_apart_take_a_fraction_of_the_bytes() -> None:
    """A number for every two tokens of a chunk in every channel, six times over, made four documents of a pack dearer
    than a pass for each: what is so large is fetched from the system each time."""
    with FakeTensorMode():
        row = inputs(4, 8 * CHUNK, by_channel=True)
        ours = peak_bytes(chunk_gated_delta_rule, row)
        assert ours < 0.35 * peak_bytes(modeling_kimi_linear.chunk_kimi_delta_attention, row)


DELTA_NETS = {
    "qwen3_5": (
        Qwen3_5ForCausalLM,
        Qwen3_5TextConfig,
        {"num_key_value_heads": 1, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
        | {"linear_key_head_dim": 8, "linear_value_head_dim": 8},
        "torch_chunk_gated_delta_rule",
    ),
    "kimi_linear": (
        KimiLinearForCausalLM,
        KimiLinearConfig,
        {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "linear_num_heads": 2}
        | {"linear_head_dim": 8, "mlp_layer_types": ["dense"] * 2},
        "chunk_kimi_delta_attention",
    ),
}


def model(kind: str) -> PreTrainedModel:
    made, config, own, _ = DELTA_NETS[kind]
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    kinds = {"num_attention_heads": 2, "layer_types": ["linear_attention", "full_attention"]}
    return made(config(**shape, **kinds, **own, bos_token_id=1, eos_token_id=2, pad_token_id=3))


@pytest.mark.parametrize("kind", DELTA_NETS)
def test_a_model_runs_by_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, ours = model(kind), model(kind)
    gated_delta_rule.install(ours)
    called = []
    (mixer,) = (part for part in ours.modules() if "forward" in vars(part))
    name = DELTA_NETS[kind][-1]
    theirs = type(mixer).forward

    def rule(*given: Any, **settings: Any) -> Any:
        called.append(1)
        return chunk_gated_delta_rule(*given, **settings)

    monkeypatch.setitem(mixer.forward.__func__.__globals__, name, rule)
    ids = torch.randint(4, 64, (2, 90))
    torch.testing.assert_close(ours(ids).logits, plain(ids).logits, rtol=1e-5, atol=1e-5)
    assert len(called) == 1
    assert inspect.unwrap(theirs).__globals__[name] is not chunk_gated_delta_rule
    settings = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(ours.generate(ids, **settings), plain.generate(ids, **settings))


def test_in_16_bits_the_state_stays_in_32() -> None:
    """Under autocast, transformers' function multiplies the state in 16 bits."""
    exact = inputs(1, 200, torch.float64)
    wanted, _ = token_by_token(exact, torch.zeros(1, 4, 8, 12, dtype=torch.float64), is_normed=True)
    row = inputs(1, 200)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = chunk_gated_delta_rule(*row, use_qk_l2norm_in_kernel=True)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def test_no_other_model_is_touched() -> None:
    other = LlamaForCausalLM(tiny_config())
    gated_delta_rule.install(other)
    assert all("forward" not in vars(part) for part in other.modules())
