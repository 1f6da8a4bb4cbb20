"""A linear and its adapter as one: peft's numbers, in parts too, and peft's own forward where ours cannot stand in."""

import pytest
import torch
from made_models import adapted, base, batch, forward, held_out
from peft.tuners.lora import LoraLayer

from qtune.memory import fused_lora as module
from qtune.memory.fused_lora import Part, fuse, inner_of, lora_linear, why_not_fused


def layer_of(kind: str = "qwen2", name: str = "q_proj", dtype=torch.float64, nf4=None, **lora) -> LoraLayer:
    model = adapted(base(kind, dtype, nf4), **lora)
    return getattr(model.get_base_model().model.layers[0].self_attn, name)


def gradients(layer, x, output, weights):
    (output * weights).sum().backward()
    found = [x.grad, layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad]
    layer.zero_grad()
    return found


@pytest.mark.parametrize("shape", [(1, 9, 64), (9, 64), (2, 3, 5, 64)])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("lora", [{}, {"use_rslora": True, "lora_alpha": 32}], ids=["plain", "rslora"])
def test_value_and_gradients_are_those_of_peft(shape, strided, lora) -> None:
    layer = layer_of(**lora)
    torch.manual_seed(2)
    values = torch.randn(*shape, dtype=torch.float64)
    if strided:
        values = values.transpose(0, -1).contiguous().transpose(0, -1)
    weights = torch.randn(*shape, dtype=torch.float64)
    results = []
    for run in (layer, lambda x: lora_linear(layer, x)):
        x = values.detach().requires_grad_()
        output = run(x)
        results.append([output.detach(), *gradients(layer, x, output, weights)])
    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gradients_by_finite_differences() -> None:
    layer = layer_of()
    x = torch.randn(1, 5, 64, dtype=torch.float64, requires_grad=True)
    low, high = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert torch.autograd.gradcheck(lambda *_: lora_linear(layer, x), (x, low, high), fast_mode=True)


def test_an_input_without_gradient_gets_none() -> None:
    layer = layer_of()
    x = torch.randn(1, 5, 64, dtype=torch.float64)
    lora_linear(layer, x).sum().backward()
    assert x.grad is None
    assert layer.lora_A["default"].weight.grad.norm() > 0


@pytest.mark.parametrize("nf4", [None, "double", "single"])
def test_rows_stand_beside_each_other(nf4) -> None:
    layer = layer_of("qwen2", "q_proj", torch.float32, nf4)
    assert layer.get_base_layer().bias is not None
    x = torch.randn(1, 9, 64)
    beside = torch.cat([lora_linear(layer, x, Part(rows=rows)) for rows in (slice(0, 32), slice(32, 64))], dim=-1)
    torch.testing.assert_close(beside, lora_linear(layer, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("nf4", [None, "double", "single"])
def test_gradients_by_columns_are_those_of_all(nf4) -> None:
    """Beside each other they are the input's and A's, and B's comes once."""
    layer = layer_of("llama", "o_proj", torch.float32, nf4)
    x, weights = torch.randn(1, 9, 64, requires_grad=True), torch.randn(1, 9, 64)
    expected = gradients(layer, x, lora_linear(layer, x), weights)
    again, inner = x.detach().requires_grad_(), inner_of(layer, x.detach())
    for columns in (slice(0, 32), slice(32, 64)):
        output = lora_linear(layer, again[..., columns], Part(columns=columns, inner=inner, is_skipped=True))
        output.backward(weights)
    low, high = layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad
    for ours, theirs in zip([again.grad, low, high], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_what_is_skipped_has_its_gradients() -> None:
    layer = layer_of()
    x = torch.randn(1, 9, 64, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(1, 9, 64, dtype=torch.float64)
    expected = gradients(layer, x, lora_linear(layer, x), weights)
    again = x.detach().requires_grad_()
    skipped = lora_linear(layer, again, Part(is_skipped=True))
    assert skipped.shape == (1, 9, 64)
    for ours, theirs in zip(gradients(layer, again, skipped, weights), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gradients_of_a_16_bit_product_are_not_rounded_to_16_bits() -> None:
    """Rounded once a tile, their sum was another than that of all tokens: losses 3e-3 apart after five steps."""
    layer = layer_of("llama", dtype=torch.bfloat16)
    torch.manual_seed(2)
    x, weights = torch.randn(1, 600, 64).bfloat16(), torch.randn(1, 600, 64).bfloat16()
    (lora_linear(layer, x) * weights).sum().backward()
    inner, scale = inner_of(layer, x).double(), layer.scaling["default"]
    exact = (scale * weights[0].double().t() @ inner).float()
    torch.testing.assert_close(layer.lora_B["default"].weight.grad, exact, rtol=1e-5, atol=1e-5)


def test_the_output_may_be_written_into() -> None:
    """Gemma 3n does: `Output 0 of _LoraLinear is a view and is being modified inplace`."""
    output = lora_linear(layer_of(), torch.randn(1, 9, 64, dtype=torch.float64))
    output.mul_(2).sum().backward()


@pytest.mark.parametrize(
    ("lora", "why"),
    [
        ({"use_dora": True}, "its adapter is not plain LoRA"),
        ({"lora_dropout": 0.1}, "its adapter drops out inputs"),
        ({"lora_bias": True}, "its adapter has a bias"),
    ],
)
@pytest.mark.parametrize("nf4", [None, "double"])
def test_other_adapters_keep_the_forward_of_peft(monkeypatch, lora, why, nf4) -> None:
    model = adapted(base("llama", nf4=nf4), **lora)
    assert why_not_fused(model.get_base_model().model.layers[0].self_attn.q_proj) == why
    assert fuse(model) == 0
    monkeypatch.setattr(module, "lora_linear", None)
    forward(model.train(), batch()).backward()


def test_every_linear_is_fused_and_only_in_training(monkeypatch) -> None:
    model, calls = adapted(base("qwen2", nf4="double")), []
    original = module.lora_linear
    monkeypatch.setattr(module, "lora_linear", lambda layer, x: calls.append(layer) or original(layer, x))
    assert fuse(model) == 4 * 7
    held_out(model, batch())
    assert not calls
    forward(model.train(), batch())
    assert len(calls) == 4 * 7
    with model.disable_adapter():
        forward(model.train(), batch())
    assert len(calls) == 4 * 7


def test_a_second_adapter_or_none_is_left_to_peft() -> None:
    model = adapted(base("llama"))
    model.add_adapter("other", model.peft_config["default"])
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    model.base_model.set_adapter(["default", "other"])
    assert why_not_fused(layer) == "it has no adapter, or several"
    assert why_not_fused(layer.get_base_layer()) == "it has no adapter, or several"
