"""MLPs and norms in tiles: the same sums, and what a gradient does not need is not made twice."""

import pytest
import torch
from made_models import LAYERS, Pass, adapted, assert_close, assert_equal, base, batch, held_out, one_pass, switched
from transformers import BloomConfig, BloomForCausalLM

from qtune.memory import fused_cross_entropy, memory_tracker
from qtune.memory.engine import Engine
from qtune.memory.gradient_checkpointing import LayerRunner, find_layers
from qtune.memory.memory_tracker import LiveBytes
from qtune.memory.techniques import Techniques
from qtune.memory.tiled_mlp import run_in_tiles, token_wise

TOKENS = 64


def count_tokens(model) -> list[int]:
    """Grows by the tokens of each call of an MLP."""
    calls: list[int] = []
    for layer in find_layers(model):
        gate = getattr(layer.mlp, "gate_up_proj", None) or layer.mlp.gate_proj
        gate.register_forward_hook(lambda module, inputs, output: calls.append(output.shape[1]))
    return calls


@pytest.mark.parametrize("tokens", [3, 10, 64, 1000])
@pytest.mark.parametrize("recomputed", [0, LAYERS])
def test_any_tile_gives_the_same_sums(tokens, recomputed) -> None:
    plain, ours = adapted(base("gemma3", torch.float64)), adapted(base("gemma3", torch.float64))
    switched(ours, Techniques(recomputed_layers=recomputed, tile_tokens=tokens))
    for inputs in (batch(), batch((64,)), batch((5,))):
        assert_close(one_pass(ours, inputs), one_pass(plain, inputs), 1e-12)
        assert held_out(ours, inputs) == pytest.approx(held_out(plain, inputs), rel=1e-12)


def test_in_bfloat16_nothing_is_rounded_otherwise() -> None:
    """Adapter gradients rounded to 16 bits once a tile made losses that were 3.3e-3 apart after five steps."""
    results = []
    for techniques in (Techniques(), Techniques(LAYERS, tile_tokens=24)):
        model = adapted(base("llama", torch.bfloat16, nf4="double"))
        switched(model, techniques)
        results.append(one_pass(model, batch()))
    assert_close(results[1], results[0], 1e-6)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3", "granite", "mistral"])
def test_inside_a_recomputed_layer_an_mlp_runs_forward_twice(kind) -> None:
    model, inputs = adapted(base(kind)), batch((TOKENS,))
    switched(model, Techniques(recomputed_layers=LAYERS, tile_tokens=24))
    calls = count_tokens(model)
    times = 3 if kind == "granite" else 2  # its output is multiplied by a number before it is added
    for _ in range(2):  # the first pass made the value to find out, and was the one that held most
        calls.clear()
        one_pass(model, inputs)
        assert sum(calls) == times * LAYERS * TOKENS
        assert set(calls) == {24, 16}


def test_an_mlp_whose_output_is_written_to_is_made() -> None:
    """Of what stands in for it no element can be written alone."""
    plain, ours, inputs = adapted(base("llama")), adapted(base("llama")), batch((TOKENS,))
    for model in (plain, ours):
        for layer in find_layers(model):
            layer.mlp.register_forward_hook(lambda module, given, output: output.mul_(1.5))
    switched(ours, Techniques(recomputed_layers=LAYERS, tile_tokens=24))
    for _ in range(2):
        assert_close(one_pass(ours, inputs), one_pass(plain, inputs), 1e-5)


def test_a_norm_behind_the_mlp_needs_its_value() -> None:
    """Found on Gemma 3: the norm was a tiled module too, was taken for the tail, and the MLP's output for zeros."""
    plain, ours, inputs = adapted(base("gemma3")), adapted(base("gemma3")), batch((TOKENS,))
    engine = switched(ours, Techniques(recomputed_layers=LAYERS, tile_tokens=24))
    calls = count_tokens(ours)
    for _ in range(3):
        calls.clear()
        assert_close(one_pass(ours, inputs), one_pass(plain, inputs), 1e-5)
        assert sum(calls) == 3 * LAYERS * TOKENS
    assert set(engine.runner.ends_in_sum.values()) == {False}


def test_tiles_that_come_later_are_skipped_too() -> None:
    """What a layer ends in was found out once and for all, before there were tiles."""
    model, inputs = adapted(base("llama")), batch((TOKENS,))
    engine = switched(model, Techniques(recomputed_layers=LAYERS))
    one_pass(model, inputs)
    engine.switch_to(Techniques(recomputed_layers=LAYERS, tile_tokens=24))
    one_pass(model, inputs)
    calls = count_tokens(model)
    one_pass(model, inputs)
    assert sum(calls) == 2 * LAYERS * TOKENS


def test_with_dropout_nothing_is_skipped_and_the_masks_are_the_same_again() -> None:
    """A tile draws its own masks, so only a tile as long as the row can be held against no tiles."""
    plain, ours = adapted(base("llama"), lora_dropout=0.2), adapted(base("llama"), lora_dropout=0.2)
    Engine(plain)
    switched(ours, Techniques(recomputed_layers=LAYERS, tile_tokens=TOKENS))
    for _ in range(2):
        passes = []
        for model in (plain, ours):
            torch.manual_seed(3)
            passes.append(one_pass(model, batch((TOKENS,))))
        assert_equal(passes[1], passes[0])


def test_with_dropout_the_gradient_is_that_of_the_tiles_that_ran() -> None:
    """Along its own direction by finite differences, as no model without tiles draws the same masks."""
    model, inputs = adapted(base("llama", torch.float64), lora_dropout=0.3), batch((TOKENS,))
    engine = switched(model, Techniques(tile_tokens=24))

    def seeded() -> Pass:
        torch.manual_seed(3)
        return one_pass(model, inputs)

    found = seeded()
    norm = sum(gradient.square().sum() for gradient in found.gradients.values()).sqrt().item()
    step, nats = 1e-3, []
    for sign in (1, -2):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data += sign * step / norm * found.gradients[name]
        nats.append(seeded().nats)
    assert (nats[0] - nats[1]) / (2 * step) == pytest.approx(norm, rel=1e-3)
    here = seeded()
    engine.switch_to(Techniques(recomputed_layers=LAYERS, tile_tokens=24))
    assert_equal(seeded(), here)
    assert_equal(seeded(), here)


def test_memory_of_an_mlp_is_that_of_a_tile() -> None:
    inputs, peaks = batch((512,)), []
    for tokens in (0, 64):
        model = adapted(base("llama"))
        switched(model, Techniques(recomputed_layers=LAYERS, tile_tokens=tokens))
        one_pass(model, inputs)
        with LiveBytes() as counter:
            one_pass(model, inputs)
        peaks.append(
            max(peak.device.get("layer workspace", 0) for name, peak in counter.peaks.items() if name != "loss")
        )
    inner = 512 * 172 * 4
    assert peaks[0] - peaks[1] > 4 * inner


@pytest.mark.parametrize("strided", [False, True])
def test_a_module_alone(strided) -> None:
    """Values, gradients of input and weights; inputs and gradients that are not contiguous."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh()).double()
    x = torch.randn(2, 21, 8, dtype=torch.float64)
    if strided:
        x = torch.randn(2, 8, 21, dtype=torch.float64).transpose(1, 2)
    weights = torch.randn(21, 2, 8, dtype=torch.float64).transpose(0, 1)
    results = []
    for tokens in (None, 4):
        module.zero_grad()
        if tokens:
            run_in_tiles(module, LayerRunner([]), tokens, is_tail=False)
        leaf = x.detach().requires_grad_()
        output = module(leaf)
        (output * weights).sum().backward()
        results.append([output.detach(), leaf.grad, *(p.grad.clone() for p in module.parameters())])
    for ours, plain in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, plain)


def test_a_frozen_norm_before_the_first_gradient_is_left_alone() -> None:
    norm = torch.nn.LayerNorm(8).requires_grad_(False)
    run_in_tiles(norm, LayerRunner([]), 4, is_tail=False)
    assert norm(torch.randn(1, 9, 8)).grad_fn is None
    assert norm(torch.randn(1, 9, 8, requires_grad=True)).grad_fn is not None


def test_tokens_without_their_row_are_not_cut_by_width() -> None:
    """OPT hands its norm (T, H): `expected input with shape [*, 64], but got input of size [63, 10]`."""
    norm = torch.nn.LayerNorm(8).requires_grad_(False)
    x = torch.randn(9, 8, requires_grad=True)
    expected = norm(x)
    run_in_tiles(norm, LayerRunner([]), 4, is_tail=False)
    assert torch.equal(norm(x), expected)


def test_a_module_that_is_given_more_than_tokens_runs_whole() -> None:
    """Bloom hands its MLP the residual: `forward() takes 2 positional arguments but 3 were given`."""

    def build():
        torch.manual_seed(0)
        config = BloomConfig(vocab_size=262, hidden_size=64, n_layer=LAYERS, n_head=4, hidden_dropout=0.0)
        model = BloomForCausalLM(config).requires_grad_(False)
        model.config.use_cache = False
        fused_cross_entropy.install(model)
        return adapted(model)

    inputs = {name: value for name, value in batch((40,)).items() if name in ("input_ids", "labels")}
    plain, ours = build(), build()
    switched(ours, Techniques(recomputed_layers=LAYERS, tile_tokens=16))
    for _ in range(2):
        assert_close(one_pass(ours, inputs), one_pass(plain, inputs), 1e-5)


def test_experts_are_not_tiled_and_norms_are() -> None:
    mlps, norms = token_wise(find_layers(adapted(base("qwen3 moe", nf4="double")))[0])
    assert mlps == []
    assert len(norms) == 2
    mlps, norms = token_wise(find_layers(adapted(base("gemma3")))[0])
    assert len(mlps) == 1
    assert len(norms) == 4


def test_fake_tensors_take_the_first_two_tiles_and_the_last() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    real = torch.zeros(1)
    with FakeTensorMode():
        fake = torch.zeros(1)
    every = [slice(0, 4), slice(4, 8), slice(8, 12), slice(12, 14)]
    assert memory_tracker.tiles(14, 4, real) == every
    assert memory_tracker.tiles(14, 4, fake) == [*every[:2], every[-1]]
    assert memory_tracker.tiles(12, 4, fake) == every[:3]
    assert memory_tracker.tiles(0, 4, real) == []
