"""Experts in NF4: the numbers of the same experts dequantised beforehand, in a fraction of their memory."""

import contextlib

import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from peft import LoraConfig, PeftModel, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import (
    AriaTextConfig,
    AriaTextForCausalLM,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from qtune.memory import memory_tracker, mixture_of_experts
from qtune.memory.expert_loading import quantized_experts
from qtune.memory.memory_tracker import quantization_state, storage_sizes
from qtune.memory.mixture_of_experts import install
from qtune.memory.nf4 import keep_weights_as_quantised
from qtune.memory.packed_experts import (
    expert_modules,
    pack,
    packed_like,
    packed_tensors,
    refusal,
    refusals,
    stacked_names,
)

SHAPE = {
    "vocab_size": 262,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts_per_tok": 2,
}
EXPERTS, WIDE = 8, 128
KINDS = {
    "qwen3": lambda **more: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**{**SHAPE, "moe_intermediate_size": WIDE, "num_experts": EXPERTS, **more})
    ),
    "mixtral": lambda **more: MixtralForCausalLM(MixtralConfig(**{**SHAPE, "num_local_experts": EXPERTS, **more})),
    "transposed": lambda **more: AriaTextForCausalLM(
        AriaTextConfig(**{**SHAPE, "moe_num_experts": EXPERTS, "pad_token_id": 2, **more})
    ),
    "transposed, with biases": lambda **more: with_biases(
        GptOssForCausalLM(GptOssConfig(**{**SHAPE, "num_local_experts": EXPERTS, **more}))
    ),
}


def with_biases(model):
    for name, parameter in model.named_parameters():
        if "bias" in name:
            torch.nn.init.normal_(parameter, 0.0, 0.1)
    return model


IDS = torch.randint(6, 262, (1, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=list(KINDS))
def folder(request, tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp(request.param)
    KINDS[request.param]().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("qwen")
    KINDS["qwen3"]().save_pretrained(path)
    return path


def load(folder, dtype=torch.float32, double=True):
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=dtype,
    )
    with quantized_experts():
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, device_map={"": "cpu"}, quantization_config=quantization
        )
    keep_weights_as_quantised(model)
    return model.requires_grad_(False)


def with_plain_experts(model):
    """The same model, its experts dequantised beforehand and run by transformers' own loop."""
    for experts in expert_modules(model):
        for name in stacked_names(experts):
            packed = getattr(experts, name)
            whole = dequantize_4bit(packed.data, packed.quant_state)
            setattr(experts, name, torch.nn.Parameter(whole, requires_grad=False))
        experts.config._experts_implementation = "eager"
    return model


def adapted(model, on_experts=False):
    targets = mixture_of_experts.expert_targets(model) if on_experts else None
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], target_parameters=targets, task_type="CAUSAL_LM")
    mixture_of_experts.register(config, model)
    with_adapter = get_peft_model(model, config)
    torch.manual_seed(1)
    for parameter in with_adapter.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return with_adapter


def loss_and_gradients(model, autocast=None):
    with torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext():
        loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_close(ours, theirs, tolerance):
    assert ours[0] == pytest.approx(theirs[0], rel=tolerance)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in ours[1].items():
        assert gradient is not None, name
        torch.testing.assert_close(gradient, theirs[1][name], rtol=0, atol=tolerance * theirs[1][name].abs().max())


@pytest.mark.parametrize("double", [True, False])
def test_loading_packs_what_bitsandbytes_would_make_of_the_whole_stack(folder, double):
    packed = load(folder, double=double)
    original = AutoModelForCausalLM.from_pretrained(folder)
    for ours, theirs in zip(expert_modules(packed), expert_modules(original), strict=True):
        for name in stacked_names(ours):
            data, state = quantize_4bit(
                getattr(theirs, name).data, blocksize=64, compress_statistics=double, quant_type="nf4"
            )
            parameter = getattr(ours, name)
            assert parameter.quant_state.shape == getattr(theirs, name).shape
            assert torch.equal(parameter.data, data)
            assert torch.equal(parameter.quant_state.absmax, state.absmax)
            assert double is parameter.quant_state.nested
            if double:
                assert torch.equal(parameter.quant_state.state2.absmax, state.state2.absmax)


def test_outside_the_context_transformers_loads_as_ever(qwen):
    load(qwen)
    quantization = BitsAndBytesConfig(load_in_4bit=True)
    model = AutoModelForCausalLM.from_pretrained(qwen, quantization_config=quantization, device_map={"": "cpu"})
    assert all(experts.gate_up_proj.ndim == 3 for experts in expert_modules(model))


def test_the_ledger_counts_packed_experts(qwen):
    experts = next(expert_modules(load(qwen)))
    parameters = list(experts.parameters())
    weights = EXPERTS * 3 * WIDE * SHAPE["hidden_size"]
    counted = storage_sizes([*parameters, *quantization_state(parameters)])
    scales = weights // 64 * (1 + 4 / 256)
    assert weights / 2 + scales <= counted <= weights / 2 + scales + 2 * (16 + 256 + 1) * 4 + 512 * 6 * len(parameters)
    held = [getattr(owner, name) for owner, name in packed_tensors(experts)]
    assert sum(t.nbytes for t in held) == weights / 2 + scales


def test_no_more_than_one_layer_of_experts_is_in_16_bits_while_loading(tmp_path):
    torch.manual_seed(0)
    layers, hidden, wide = 6, 128, 256
    more = {"hidden_size": hidden, "moe_intermediate_size": wide, "num_hidden_layers": layers}
    KINDS["qwen3"](**more).to(torch.bfloat16).save_pretrained(tmp_path)
    with memory_tracker.LiveBytes() as counter:
        model = load(tmp_path, torch.bfloat16)
        held = sum(counter.held().values())
        peak = counter.peaks["load"].device_bytes
    one_layer = 2 * EXPERTS * 3 * wide * hidden
    assert isinstance(model, Qwen3MoeForCausalLM)
    assert peak - held < one_layer


@pytest.mark.parametrize(("autocast", "tolerance"), [(None, 1e-6), (torch.bfloat16, 2e-2)])
def test_loss_and_gradients_are_those_of_experts_dequantised_beforehand(folder, autocast, tolerance):
    ours = loss_and_gradients(adapted(load(folder)), autocast)
    theirs = loss_and_gradients(adapted(with_plain_experts(load(folder))), autocast)
    assert_close(ours, theirs, 3 * tolerance)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-6 if autocast is None else 1e-3)


def test_a_model_in_bfloat16(qwen):
    ours = loss_and_gradients(adapted(load(qwen, torch.bfloat16)), torch.bfloat16)
    theirs = loss_and_gradients(adapted(with_plain_experts(load(qwen, torch.bfloat16))), torch.bfloat16)
    assert_close(ours, theirs, 5e-2)


def test_odd_widths_start_each_expert_on_a_block(tmp_path):
    """48 inputs are less than a block, so that blocks run across rows."""
    torch.manual_seed(0)
    KINDS["qwen3"](moe_intermediate_size=48).save_pretrained(tmp_path)
    model = load(tmp_path)
    experts = next(expert_modules(model))
    hidden, index, weights = torch.randn(9, 64), torch.arange(18).view(9, 2) % EXPERTS, torch.rand(9, 2)
    ours = experts(hidden, index, weights)
    for name in stacked_names(experts):
        packed = getattr(experts, name)
        shape = packed.quant_state.shape
        packed.quant_state.shape = torch.Size((shape.numel(),))  # rows of 48 are misread by the kernel for the CPU
        whole = dequantize_4bit(packed.data, packed.quant_state).view(shape)
        setattr(experts, name, torch.nn.Parameter(whole, requires_grad=False))
    experts.config._experts_implementation = "eager"
    torch.testing.assert_close(ours, experts(hidden, index, weights), rtol=1e-5, atol=1e-7)


@pytest.fixture
def layer(qwen):
    experts = next(expert_modules(load(qwen)))
    torch.manual_seed(2)
    hidden = torch.randn(30, 64, requires_grad=True)
    index = torch.stack([torch.randperm(EXPERTS - 2)[:2] for _ in range(30)])  # the last two are not hit
    weights = torch.rand(30, 2, requires_grad=True)
    return experts, hidden, index, weights


def run_layer(experts, hidden, index, weights, how):
    output = how(experts, hidden, index, weights)
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    return output.detach(), hidden.grad.clone(), weights.grad.clone()


def test_groups_change_no_bit(layer, monkeypatch):
    experts, hidden, index, weights = layer
    results = []
    for most in (1, 64 << 20):  # bytes: each expert alone, all that were hit
        monkeypatch.setattr(mixture_of_experts, "GROUP_BYTES", most)
        hidden.grad = weights.grad = None
        results.append(run_layer(experts, hidden, index, weights, lambda layer, *given: layer(*given)))
    for alone, grouped in zip(*results, strict=True):
        assert torch.equal(alone, grouped)


@pytest.mark.parametrize(
    ("counts", "most", "expected"),
    [
        ([3, 1, 2], 8, [(0, 3)]),
        ([3, 1, 2], 2, [(0, 2), (2, 3)]),
        ([0, 1, 0, 0, 5, 6, 7, 0], 2, [(1, 2), (4, 6), (6, 7)]),
        ([0, 0], 8, []),
        ([1, 0, 0, 1], 8, [(0, 1), (3, 4)]),
        ([2], 1, [(0, 1)]),
    ],
)
def test_a_group_are_experts_beside_each_other_that_were_hit(counts, most, expected):
    assert [(run.start, run.stop) for run in mixture_of_experts._runs(counts, most)] == expected


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def as_on_a_card(monkeypatch):
    monkeypatch.setattr(memory_tracker, "capability_for", lambda tensor: (8, 6))


@pytest.mark.parametrize("rank", [4, 8])
def test_a_card_multiplies_a_group_at_once(qwen, monkeypatch, rank):
    """Rows of an adapter of rank 4 are too short for it; then each expert's are multiplied alone."""
    model = load(qwen, torch.bfloat16)
    config = LoraConfig(r=rank, target_modules=[], target_parameters=mixture_of_experts.expert_targets(model))
    mixture_of_experts.register(config, model)
    adapted = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    results = []
    for is_on_card in (False, True):
        if is_on_card:
            as_on_a_card(monkeypatch)
        adapted.zero_grad()
        with Operations() as seen:
            results.append(loss_and_gradients(adapted))
        calls = seen.names.count("_grouped_mm")
        assert bool(calls) == is_on_card
        results[-1] = results[-1][0], {name: gradient.clone() for name, gradient in results[-1][1].items()}
    assert_close(results[1], results[0], 0.05)


def test_kernels_on_a_card_do_not_grow_with_the_experts(layer, monkeypatch):
    experts, hidden, _, weights = layer
    as_on_a_card(monkeypatch)
    launched = []
    for hit in (2, 6):
        index = torch.arange(60).view(30, 2) % hit
        given = hidden.detach().bfloat16().requires_grad_(), index, weights.detach().bfloat16().requires_grad_()
        with Operations() as seen:
            experts(*given).float().sum().backward()
        launched.append(len(seen.names))
    assert launched[0] == launched[1]


class Reentrant(torch.autograd.Function):
    """Keeps its input and runs the layer again in its backward pass."""

    @staticmethod
    def forward(ctx, hidden, weights, index, experts):
        ctx.save_for_backward(hidden, weights)
        ctx.rest = index, experts
        return experts(hidden, index, weights)

    @staticmethod
    def backward(ctx, gradient):
        hidden, weights = (t.detach().requires_grad_() for t in ctx.saved_tensors)
        index, experts = ctx.rest
        with torch.enable_grad():
            output = experts(hidden, index, weights)
        torch.autograd.backward(output, gradient)
        return hidden.grad, weights.grad, None, None


@pytest.mark.parametrize("how", ["plain", "checkpoint", "reentrant checkpoint", "own function"])
def test_inside_recomputation(layer, how):
    ways = {
        "plain": lambda experts, *given: experts(*given),
        "checkpoint": lambda experts, *given: checkpoint(experts, *given, use_reentrant=False),
        "reentrant checkpoint": lambda experts, *given: checkpoint(experts, *given, use_reentrant=True),
        "own function": lambda experts, hidden, index, weights: Reentrant.apply(hidden, weights, index, experts),
    }
    experts, hidden, index, weights = layer
    ours = run_layer(experts, hidden, index, weights, ways[how])
    hidden.grad = weights.grad = None
    for name in stacked_names(experts):
        packed = getattr(experts, name)
        setattr(experts, name, torch.nn.Parameter(dequantize_4bit(packed.data, packed.quant_state), False))
    experts.config._experts_implementation = "eager"
    theirs = run_layer(experts, hidden, index, weights, ways["plain"])
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-6 * reference.abs().max().item())


def test_only_input_and_routing_are_kept_for_the_backward_pass(layer):
    experts, hidden, index, weights = layer
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        experts(hidden, index, weights)
    assert sorted(tuple(t.shape) for t in kept) == [(experts.num_experts,), (30, 2), (30, 64), (60,)]


def test_weights_that_are_replaced_between_the_passes_are_read_where_they_are(layer):
    """Streaming takes a layer's weights away after its forward pass and brings them back elsewhere."""
    experts, hidden, index, weights = layer
    before = run_layer(experts, hidden, index, weights, lambda layer, *given: layer(*given))
    hidden.grad = weights.grad = None
    output = experts(hidden, index, weights)
    home = [(owner, name, getattr(owner, name).clone()) for owner, name in packed_tensors(experts)]
    for owner, name, tensor in home:
        getattr(owner, name).zero_()
        setattr(owner, name, tensor)
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    assert torch.equal(hidden.grad, before[1])
    assert torch.equal(weights.grad, before[2])


@pytest.mark.parametrize("at_once", [1, 3])
def test_fake_tensors_run_through_a_layer_with_balanced_routing(monkeypatch, at_once):
    tokens, first_matrix = 64, 4 * 2 * WIDE * 64
    monkeypatch.setattr(mixture_of_experts, "GROUP_BYTES", at_once * first_matrix)
    with FakeTensorMode():
        layer = KINDS["qwen3"]().model.layers[0].mlp.requires_grad_(False)
        experts = layer.experts
        for name in stacked_names(experts):
            setattr(experts, name, packed_like(getattr(experts, name), double=True))
        install(layer)
        hidden = torch.empty(1, tokens, 64, requires_grad=True)
        with memory_tracker.LiveBytes() as counter:
            output = layer(hidden)
            output.sum().backward()
    assert hidden.grad.shape == hidden.shape
    highest = counter.peaks["load"].device["dequantised weights"]
    assert (at_once - 1) * first_matrix < highest <= at_once * first_matrix


def test_a_fake_pass_counts_what_a_real_one_takes():
    def peak(mode, tokens=64):
        with mode:
            layer = KINDS["qwen3"]().model.layers[0].mlp.requires_grad_(False)
            for name in stacked_names(layer.experts):
                parameter = getattr(layer.experts, name)
                like = packed_like(parameter, True)
                setattr(layer.experts, name, like if isinstance(mode, FakeTensorMode) else pack_of(parameter))
            install(layer)
            hidden = torch.zeros(tokens, 64, requires_grad=True)
            index = torch.arange(2 * tokens).view(tokens, 2) % EXPERTS
            weights = torch.zeros(tokens, 2, requires_grad=True)
            with memory_tracker.LiveBytes() as counter:
                layer.experts(hidden, index, weights).sum().backward()
            return counter.peaks["load"].device_bytes

    assert peak(FakeTensorMode()) == pytest.approx(peak(contextlib.nullcontext()), rel=0.02)


def pack_of(parameter):
    return pack(iter(parameter.data), parameter.shape, True)


def test_fake_and_real_parameters_have_the_same_tensors():
    stack = torch.randn(3, 64, 96)
    real, fake = pack(iter(stack), stack.shape, True), packed_like(stack, True)
    for (_, mine), (_, theirs) in zip(tensors_of(real), tensors_of(fake), strict=True):
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)


def tensors_of(parameter):
    state = parameter.quant_state
    assert isinstance(state, QuantState)
    return [
        ("data", parameter.data),
        ("absmax", state.absmax),
        ("code", state.code),
        ("offset", state.offset),
        ("state2.absmax", state.state2.absmax),
        ("state2.code", state.state2.code),
    ]


def test_an_adapter_on_experts_is_pefts_own_and_loads_there(folder, tmp_path):
    ours = adapted(load(folder), on_experts=True)
    mine = loss_and_gradients(ours)
    ours.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(with_plain_experts(load(folder)), tmp_path, is_trainable=True)
    theirs = loss_and_gradients(plain)
    assert len([name for name in mine[1] if "experts" in name]) == 2 * 2 * 2
    assert_close(mine, theirs, 1e-5)
    with ours.disable_adapter(), plain.disable_adapter(), torch.no_grad():
        without = [model(input_ids=IDS, labels=IDS).loss.item() for model in (ours, plain)]
    assert without[0] == pytest.approx(without[1], rel=1e-6)
    assert without[0] != pytest.approx(mine[0], rel=1e-4)


def test_an_adapter_on_experts_loads_onto_packed_ones(qwen, tmp_path):
    ours = adapted(load(qwen), on_experts=True)
    ours.save_pretrained(tmp_path)
    config, again = LoraConfig.from_pretrained(tmp_path), load(qwen)
    mixture_of_experts.register(config, again)
    loaded = PeftModel.from_pretrained(again, tmp_path, config=config)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=IDS).logits, ours.eval()(input_ids=IDS).logits)


def test_a_layer_whose_input_needs_no_gradient_trains_its_adapter(layer):
    experts, hidden, index, weights = layer
    a, b = torch.randn(EXPERTS * 2, 64, requires_grad=True), torch.randn(2 * WIDE, EXPERTS * 2, requires_grad=True)
    experts.lent_factors = {"gate_up_proj": mixture_of_experts.Factors(a, b, 0.5)}
    experts(hidden.detach(), index, weights.detach()).sum().backward()
    assert a.grad.abs().sum() > 0
    assert b.grad.abs().sum() > 0
    assert not a.grad[-4:].any()  # of the two experts that are not hit


def test_experts_that_stay_in_16_bits_say_why(tmp_path):
    normed = KINDS["qwen3"]()
    for experts in expert_modules(normed):
        experts.has_post_expert_norm = True
    (why,) = refusals(normed)
    assert "Qwen3MoeExperts" in why
    assert "norm" in why
    torch.manual_seed(0)
    uneven = KINDS["qwen3"](hidden_size=36, moe_intermediate_size=24)
    assert "36 x 24 weights of down_proj" in refusal(next(expert_modules(uneven)))
    uneven.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert next(expert_modules(loaded)).gate_up_proj.ndim == 3
    assert loss_and_gradients(adapted(loaded))[0] > 0
