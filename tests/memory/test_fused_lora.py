"""A linear and its adapter as one: peft's numbers, in parts too, and peft's own forward where ours cannot stand in."""

from collections import Counter

import bitsandbytes
import pytest
import torch
from made_models import adapted, assert_close, base, batch, forward, held_out, one_pass, trained
from peft.tuners.lora import LoraLayer
from torch.utils._python_dispatch import TorchDispatchMode

from qtune.memory import fused_lora as module
from qtune.memory.engine import Engine
from qtune.memory.fused_lora import Part, fuse, inner_of, lora_linear, why_not_fused
from qtune.memory.layer_ops import GatedProduct


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
    assert not fuse(model)
    monkeypatch.setattr(module, "lora_linear", None)
    forward(model.train(), batch()).backward()


class Products(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func._overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def fused_calls(model, inputs, is_training: bool = True) -> int:
    """How many linears of a pass have run as one operation with their adapter."""
    with Products() as products:
        if is_training:
            forward(model.train(), inputs)
        else:
            held_out(model, inputs)
    return products.names["addmm_"]


def test_every_linear_is_fused_in_training_and_with_many_rows() -> None:
    model = adapted(base("qwen2", nf4="double"))
    assert sum(len(siblings.layers) for siblings in fuse(model)) == 4 * 7
    assert fused_calls(model, batch()) == 4 * 7
    assert fused_calls(model, batch((512,)), is_training=False) == 0
    assert fused_calls(model, batch((513,)), is_training=False) == 4 * 7
    with model.disable_adapter():
        assert fused_calls(model, batch()) == 0


@pytest.mark.parametrize("nf4", [None, "double"])
def test_many_rows_in_evaluation_give_the_loss_of_peft(nf4) -> None:
    dtype = torch.float32 if nf4 else torch.float64
    ours, plain = adapted(base("llama", dtype, nf4)), adapted(base("llama", dtype, nf4))
    fuse(ours)
    rel = 1e-6 if nf4 else 1e-12
    assert held_out(ours, batch((600,))) == pytest.approx(held_out(plain, batch((600,))), rel=rel)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("lora", [{}, {"target_modules": ["q_proj", "v_proj", "down_proj"]}], ids=["all", "some"])
def test_linears_of_the_same_input_give_the_numbers_of_peft(kind, lora) -> None:
    """Together, with a product that is made again; and where some of them have no adapter, apart."""
    ours, plain = (adapted(base(kind, torch.float64), **lora) for _ in range(2))
    together = [len(siblings.layers) for siblings in fuse(ours)]
    assert sorted(together) == sorted([1, 1, 1] * 4 if lora else [3, 2, 1, 1] * 4)
    assert_close(one_pass(ours, batch()), one_pass(plain, batch()), 1e-12)


def test_linears_of_other_ranks_and_scales_go_together() -> None:
    lora = {"rank_pattern": {"k_proj": 2, "up_proj": 7}, "alpha_pattern": {"v_proj": 3}, "use_rslora": True}
    ours, plain = (adapted(base("llama", torch.float64), **lora) for _ in range(2))
    fuse(ours)
    assert_close(one_pass(ours, batch()), one_pass(plain, batch()), 1e-12)


def test_in_16_bits_together_is_apart_to_rounding() -> None:
    """A below each other are one product, of which each has its share; rounded once less where gradients are summed."""
    together, apart = (adapted(base("llama", torch.bfloat16, "double")) for _ in range(2))
    fuse(together)
    for siblings in fuse(apart):
        siblings.is_apart = True
    ours, theirs = one_pass(together, batch()), one_pass(apart, batch())
    assert ours.nats == pytest.approx(theirs.nats, rel=1e-4)
    assert_close(ours, theirs, 0.02)


def test_one_product_for_what_has_the_same_input() -> None:
    """x A' of queries, keys and values at once: four products of a layer in place of seven, and four casts."""
    model = adapted(base("llama", torch.bfloat16))
    fuse(model)
    with Products() as products:
        nats = forward(model.train(), batch((64,)))
    layers = 4
    assert products.names["mm"] == layers * (7 + 4) + 1 + 1  # the head, and its gradient
    assert products.names["_foreach_copy_"] == layers * 4
    nats.backward()


def test_a_sibling_that_has_another_input_is_computed_by_itself() -> None:
    model = adapted(base("llama", torch.float64))
    first, *_ = fuse(model)
    q, k, v = first.layers
    x, y = (torch.randn(1, 5, 64, dtype=torch.float64) for _ in range(2))
    model.train()
    expected = [lora_linear(layer, given) for layer, given in ((q, x), (k, y), (v, x))]
    for _ in range(2):
        for mine, wanted in zip((q(x), k(y), v(x)), expected, strict=True):
            torch.testing.assert_close(mine, wanted)
    assert first.is_apart
    assert first._input is None


def test_after_a_pass_that_failed_siblings_go_on_together() -> None:
    """What the failed pass left was taken for another input, and sums were rounded otherwise from there on."""
    model = adapted(base("llama"))
    engine = Engine(model)
    first = engine.siblings[0]
    q, k, v = first.layers
    x, again = torch.randn(1, 5, 64), torch.randn(1, 5, 64)
    model.train()
    q(x)
    for mine, layer in ((q(again), q), (k(again), k), (v(again), v)):
        torch.testing.assert_close(mine, lora_linear(layer, again))
    assert not first.is_apart
    q(x)
    assert first._waiting
    engine.forget_pass()
    assert first._input is None
    assert not first._waiting


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_the_product_before_a_linear_is_not_kept(activation) -> None:
    layer = layer_of("llama", "q_proj", torch.bfloat16)
    fuse(torch.nn.ModuleList([layer]))
    layer.train()
    gate, up = (torch.randn(1, 512, 64).bfloat16().requires_grad_() for _ in range(2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        output = layer(GatedProduct(gate, up, activation))
    assert sorted(kept, key=len)[-2:] == [gate.shape, up.shape]
    assert len([shape for shape in kept if len(shape) == 3 or shape[0] == 512]) == 3
    output.sum().backward()
    assert gate.grad.norm() > 0


def test_weights_that_an_optimizer_changes_unseen_are_used_at_once() -> None:
    """bitsandbytes writes weights without raising their version: a copy in 16 bits that waits for that is stale."""
    model = adapted(base("llama", torch.bfloat16))
    fuse(model)
    optimizer = bitsandbytes.optim.AdamW8bit(trained(model), lr=0.1)
    before = one_pass(model, batch())
    for parameter in trained(model):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert one_pass(model, batch()).nats != before.nats


def test_a_second_adapter_or_none_is_left_to_peft() -> None:
    model = adapted(base("llama"))
    model.add_adapter("other", model.peft_config["default"])
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    model.base_model.set_adapter(["default", "other"])
    assert why_not_fused(layer) == "it has no adapter, or several"
    assert why_not_fused(layer.get_base_layer()) == "it has no adapter, or several"
