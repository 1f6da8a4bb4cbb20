"""A linear and its adapter as one: peft's numbers, in parts too, and peft's own forward where ours cannot stand in."""

import pytest
import torch
from made_models import adapted, base, batch, forward, held_out
from peft.tuners.lora import LoraLayer

from qtune.memory import lora_linear as module
from qtune.memory.lora_linear import Part, fuse, lora_linear, why_not_fused


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
def test_parts_add_up(nf4) -> None:
    """Rows stand beside each other, columns are summed, and the bias is added once."""
    torch.manual_seed(2)
    queries, output = (layer_of("qwen2", name, torch.float32, nf4) for name in ("q_proj", "o_proj"))
    output.get_base_layer().bias = torch.nn.Parameter(torch.randn(64), requires_grad=False)
    assert queries.get_base_layer().bias is not None
    x = torch.randn(1, 9, 64)
    halves = [slice(0, 32), slice(32, 64)]
    beside = torch.cat([lora_linear(queries, x, Part(rows=half)) for half in halves], dim=-1)
    summed = sum(lora_linear(output, x[..., half], Part(columns=half)) for half in halves)
    torch.testing.assert_close(beside, lora_linear(queries, x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(summed, lora_linear(output, x), rtol=1e-5, atol=1e-5)


def test_a_sink_takes_the_gradient_of_the_input_and_what_is_skipped_has_one() -> None:
    layer = layer_of()
    x = torch.randn(1, 9, 64, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(1, 9, 64, dtype=torch.float64)
    expected = gradients(layer, x, lora_linear(layer, x), weights)
    sink = torch.ones_like(x)
    skipped = lora_linear(layer, x.detach(), Part(sink=sink, is_skipped=True))
    assert skipped.shape == (1, 9, 64)
    (skipped * weights).sum().backward()
    torch.testing.assert_close(sink - 1, expected[0])
    torch.testing.assert_close(layer.lora_A["default"].weight.grad, expected[1])
    torch.testing.assert_close(layer.lora_B["default"].weight.grad, expected[2])


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
