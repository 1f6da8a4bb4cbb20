"""Every technique on every kind of model: the loss and the gradients of the model without it."""

from dataclasses import replace

import pytest
import torch
from crossed import crossed
from made_models import (
    KINDS,
    LAYERS,
    adapted,
    assert_close,
    assert_equal,
    base,
    batch,
    forward,
    held_out,
    one_pass,
    switched,
    trained,
)

from qtune.memory.engine import Engine, refusals
from qtune.memory.techniques import Techniques

ALL = Techniques(
    recomputed_layers=LAYERS,
    host_checkpoints=True,
    tile_tokens=10,  # of 63, so that the last tile is a short one
    host_embedding=True,
    head="host",
    streamed_layers=LAYERS,
    head_groups=2,
)


def allowed(kind: str, techniques: Techniques) -> Techniques:
    """`techniques` without those that a kind of model refuses."""
    return replace(techniques, head_groups=1) if kind in WITHOUT_GROUPS else techniques


WITHOUT_GROUPS = dict.fromkeys(("phi3", "gemma3n", "gemma4"), "its attention is not made of four plain projections")


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_what_a_kind_of_model_refuses(kind) -> None:
    found = refusals(adapted(base(kind)))
    assert found == ({"head_groups": WITHOUT_GROUPS[kind]} if kind in WITHOUT_GROUPS else {})


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"qwen3 moe"}))
def test_all_of_them_in_float64(kind) -> None:
    """Exact but for the order of sums: several documents, a lone one, the first again."""
    plain, ours = adapted(base(kind, torch.float64)), adapted(base(kind, torch.float64))
    switched(ours, allowed(kind, ALL))
    for lengths in ((23, 9, 1, 30), (63,), (23, 9, 1, 30)):
        assert_close(one_pass(ours, batch(lengths)), one_pass(plain, batch(lengths)), 1e-12)


@pytest.mark.parametrize(
    ("kind", "nf4", "autocast", "tolerance"),
    crossed(
        ["llama", "gemma3", "phi3", "qwen3 moe"],
        # a gradient can be as small as the rounding of bfloat16 beside it, and a router can round to another expert
        [("double", torch.bfloat16, 0.2), ("double", None, 1e-5), ("single", None, 1e-5)],
    ),
)
def test_all_of_them_on_an_nf4_base(kind, nf4, autocast, tolerance) -> None:
    dtype = autocast or torch.float32
    plain, ours = adapted(base(kind, dtype, nf4)), adapted(base(kind, dtype, nf4))
    switched(ours, allowed(kind, ALL))
    for lengths in ((23, 9, 1, 30), (63,)):
        assert_close(one_pass(ours, batch(lengths), autocast), one_pass(plain, batch(lengths), autocast), tolerance)


@pytest.mark.parametrize("nf4", [None, "double"])
def test_passes_add_up(nf4) -> None:
    plain, ours = adapted(base("qwen2", nf4=nf4)), adapted(base("qwen2", nf4=nf4))
    switched(ours, ALL)
    for model in (plain, ours):
        for seed in (0, 1):
            forward(model.train(), batch(seed=seed)).backward()
    for mine, theirs in zip(trained(ours), trained(plain), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def test_passes_evaluation_and_generation_in_any_order() -> None:
    plain, ours = adapted(base("gemma3", nf4="double")), adapted(base("gemma3", nf4="double"))
    switched(ours, ALL)
    prompt = {"input_ids": batch()["input_ids"][:, :9], "max_new_tokens": 6, "do_sample": False, "use_cache": True}

    def evaluate() -> None:
        assert held_out(ours, batch()) == pytest.approx(held_out(plain, batch()), rel=1e-6)

    def train() -> None:
        assert_close(one_pass(ours, batch()), one_pass(plain, batch()), 1e-5)

    def generate() -> None:
        assert torch.equal(ours.eval().generate(**prompt), plain.eval().generate(**prompt))

    for act in (evaluate, generate, train, evaluate, train, generate, generate, train):
        act()


def test_in_eval_mode_gradients_are_right_too() -> None:
    plain, ours = adapted(base("llama", nf4="double")), adapted(base("llama", nf4="double"))
    switched(ours, ALL)
    for model in (plain, ours):
        forward(model.eval(), batch()).backward()
    for mine, theirs in zip(trained(ours), trained(plain), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def test_a_disabled_adapter_is_the_base_alone() -> None:
    ours, alone = adapted(base("llama", nf4="double")), base("llama", nf4="double")
    switched(ours, ALL)
    tuned = held_out(ours, batch())
    with ours.disable_adapter():
        assert held_out(ours, batch()) == pytest.approx(held_out(alone, batch()), rel=1e-6)
        ours.train()  # as a reference model in a training loop is
        with torch.no_grad():
            assert forward(ours, batch()).item() == pytest.approx(held_out(alone, batch()), rel=1e-6)
    assert held_out(ours, batch()) == tuned


@pytest.mark.parametrize(
    "lora",
    [{"use_dora": True}, {"lora_bias": True, "use_dora": False}, {"lora_dropout": 0.3}, {"use_rslora": True}],
    ids=["dora", "bias", "dropout", "rslora"],
)
def test_adapters_of_other_kinds(lora) -> None:
    """What ours cannot stand in for runs by peft's own forward, with the same random numbers."""
    plain, ours = adapted(base("llama", nf4="double"), **lora), adapted(base("llama", nf4="double"), **lora)
    techniques = replace(ALL, tile_tokens=0, head_groups=1 if "head_groups" in refusals(ours) else 2)
    assert techniques.head_groups == (2 if "use_rslora" in lora else 1)
    switched(ours, techniques)
    passes = []
    for model in (plain, ours):
        torch.manual_seed(5)
        passes.append([one_pass(model, batch()), one_pass(model, batch(seed=1))])
    for mine, theirs in zip(passes[1], passes[0], strict=True):
        (assert_close if "use_rslora" in lora else lambda a, b, _: assert_equal(a, b))(mine, theirs, 1e-5)


def test_a_climb_in_the_middle_of_a_run() -> None:
    """One technique after another, as a run that is out of memory takes them; each for good."""
    plain, ours = adapted(base("llama", nf4="double")), adapted(base("llama", nf4="double"))
    engine = Engine(ours)
    expected = one_pass(plain, batch())
    on = Techniques()
    for change in (
        {"recomputed_layers": 2},
        {"recomputed_layers": LAYERS},
        {"host_checkpoints": True},
        {"tile_tokens": 20},
        {"host_embedding": True},
        {"streamed_layers": 3},
        {"head_groups": 2},
        {"tile_tokens": 7},
    ):
        on = replace(on, **change)
        engine.switch_to(on)
        assert engine.techniques == on
        assert_close(one_pass(ours, batch()), expected, 1e-5)
    engine.switch_to(Techniques())
    assert engine.techniques == on
    assert_close(one_pass(ours, batch()), expected, 1e-5)


class Hidden(torch.nn.Module):
    """A layer wrapped in a module that transformers knows nothing of."""

    def __init__(self, layer: torch.nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, *args: object, **kwargs: object) -> torch.Tensor:
        return self.layer(*args, **kwargs)


def unknown_layers() -> torch.nn.Module:
    model = base("llama")
    model.model.layers = torch.nn.ModuleList(Hidden(layer) for layer in model.model.layers)
    return adapted(model)


def test_layers_that_cannot_be_found_refuse_what_needs_them_and_the_rest_works() -> None:
    plain, ours = unknown_layers(), unknown_layers()
    found = refusals(ours)
    wanted = {
        "recomputed_layers",
        "host_checkpoints",
        "tile_tokens",
        "streamed_layers",
        "sharded_layers",
        "head_groups",
    }
    assert set(found) == wanted | {"recomputed_attention"}
    assert set(found.values()) == {"the decoder layers of LlamaForCausalLM cannot be run one by one"}
    switched(ours, Techniques(host_embedding=True))
    assert_close(one_pass(ours, batch()), one_pass(plain, batch()), 1e-5)
