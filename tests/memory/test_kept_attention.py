"""Attention's output, kept for the recomputation: to the bit what it is when attention runs again, and run once."""

from collections import Counter
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny_config
from made_models import LAYERS, Pass, adapted, assert_equal, base, batch, held_out, one_pass, switched
from real_steps import recipe_for
from torch.utils._python_dispatch import TorchDispatchMode

from qtune.accelerator import Capability
from qtune.memory import kept_attention
from qtune.memory.engine import Engine, refusals
from qtune.memory.gradient_checkpointing import find_layers
from qtune.memory.kept_attention import PART, Kept
from qtune.memory.memory_tracker import LiveBytes, block_bytes
from qtune.memory.packed_attention import document_attention
from qtune.memory.techniques import Techniques
from qtune.plan.activation_memory import forecaster, trace
from qtune.plan.forecast import LOSS
from qtune.plan.workload import BatchShape

KEPT = Techniques(recomputed_layers=LAYERS)
AGAIN = KEPT.having(recomputed_attention=LAYERS)
LENGTHS = (23, 9, 1, 30)  # in three buckets of powers of two
BUCKETS = 4 - 1
FLASH = "aten::_scaled_dot_product_flash_attention_for_cpu"


class Ran(TorchDispatchMode):
    """How often each operation ran."""

    def __init__(self) -> None:
        super().__init__()
        self.times: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.times[func._overloadpacket._qualified_op_name] += 1
        return func(*args, **(kwargs or {}))


def attention_of(model: Any, inputs: dict[str, Any]) -> int:
    """How often attention's forward pass runs in a pass of the model, forward and backward."""
    with Ran() as ran:
        one_pass(model, inputs)
    return ran.times[FLASH]


def seeded(model: Any, inputs: dict[str, Any]) -> Pass:
    torch.manual_seed(3)
    return one_pass(model, inputs)


@pytest.mark.parametrize(
    ("on", "runs_again"),
    [
        ({}, 1),
        ({"host_checkpoints": True}, 1),
        ({"tile_tokens": 10}, 1),
        ({"streamed_layers": 2}, 1),
        ({"head": "host", "host_embedding": True}, 1),
        ({"head_groups": 2}, 2),
        ({"host_checkpoints": True, "tile_tokens": 10, "streamed_layers": LAYERS, "head": "nf4", "head_groups": 2}, 2),
    ],
    ids=lambda on: "+".join(on) if isinstance(on, dict) else str(on),
)
def test_with_each_technique_attention_runs_once_to_the_bit(on: dict[str, Any], runs_again: int) -> None:
    kept, again = adapted(base("llama", nf4="double")), adapted(base("llama", nf4="double"))
    switched(kept, KEPT.having(**on))
    switched(again, AGAIN.having(**on))
    for inputs in (batch(LENGTHS), batch((63,)), batch(LENGTHS, seed=1)):
        assert_equal(seeded(kept, inputs), seeded(again, inputs))
    once = LAYERS * BUCKETS * on.get("head_groups", 1)
    assert attention_of(kept, batch(LENGTHS)) == once
    assert attention_of(again, batch(LENGTHS)) == once * (1 + runs_again)


@pytest.mark.parametrize("kind", ["gemma3", "mistral", "qwen3 moe"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_windows_experts_and_dropout_of_the_adapter(kind: str, autocast: torch.dtype | None) -> None:
    passes = []
    for on in (KEPT, AGAIN):
        model = adapted(base(kind), **({} if "moe" in kind else {"lora_dropout": 0.2}))
        switched(model, on)
        torch.manual_seed(5)
        passes.append(([one_pass(model, batch(lengths), autocast) for lengths in (LENGTHS, (63,))], torch.rand(1)))
    (kept, kept_after), (again, again_after) = passes
    for mine, theirs in zip(kept, again, strict=True):
        assert_equal(mine, theirs)
    assert kept_after == again_after


@pytest.mark.parametrize("layers", range(LAYERS + 1))
def test_the_first_layers_run_it_again(layers: int) -> None:
    model = adapted(base("llama"))
    engine = switched(model, KEPT.having(recomputed_attention=layers))
    assert attention_of(model, batch((63,))) == LAYERS + layers
    engine.switch_to(AGAIN)  # as a run does that is out of memory
    assert attention_of(model, batch((63,))) == 2 * LAYERS


def test_a_pass_that_fails_on_its_way_back_leaves_nothing() -> None:
    """Each time in another layer: what is kept goes with the pass, and the next one is exact."""
    model = adapted(base("llama"))
    engine = switched(model, KEPT.having(head_groups=2))
    expected = seeded(model, batch(LENGTHS))
    calls, fail_at = 0, 0

    def fault(module: torch.nn.Module, arguments: object) -> None:
        nonlocal calls
        calls += 1
        if calls == fail_at:
            raise RuntimeError("injected")

    for layer in find_layers(model):
        layer.mlp.up_proj.register_forward_pre_hook(fault)
    with LiveBytes() as counter:
        for fail_at in range(1, 2 * LAYERS + 1):
            calls = 0
            with pytest.raises(RuntimeError, match="injected"):
                one_pass(model, batch(LENGTHS))
            engine.forget_pass()
            model.zero_grad()
            assert counter.held().get(PART, 0) == 0, fail_at
    fail_at = 0
    assert_equal(seeded(model, batch(LENGTHS)), expected)


def test_evaluation_keeps_nothing() -> None:
    model = adapted(base("llama"))
    switched(model, KEPT)
    with LiveBytes() as counter:
        held_out(model, batch(LENGTHS))
        assert PART not in {part for peak in counter.peaks.values() for part in peak.device}
        one_pass(model, batch(LENGTHS))
    assert max(peak.device.get(PART, 0) for peak in counter.peaks.values()) > 0
    assert counter.held().get(PART, 0) == 0


def test_attention_that_drops_out_weights_is_refused() -> None:
    """And where it is on all the same, as nobody asked, nothing is kept and nothing changes."""
    passes = []
    for on in (KEPT, AGAIN):
        model = base("llama")
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.1
        model = adapted(model)
        engine = Engine(model)
        engine.runner.keeps_random_state = True  # which the config says of a model that is loaded
        assert "drops out weights" in refusals(model)["recomputed_attention"]
        engine.switch_to(on)
        passes.append(seeded(model, batch(LENGTHS)))
    assert_equal(*passes)


QUERIES = torch.empty(1, 4, 16, 8, device="meta", dtype=torch.bfloat16)


def efficient(sums: bool = False, dropout: float = 0.0) -> Any:
    return torch.ops.aten._scaled_dot_product_efficient_attention(QUERIES, QUERIES, QUERIES, None, sums, dropout)


def called(kept: Kept, run: Any, with_gradients: bool = True) -> Any:
    with kept_attention.of_layer(kept), torch.set_grad_enabled(with_gradients), kept_attention.one_call():
        return run()


def test_a_kernel_that_returns_sums_if_asked_is_asked() -> None:
    """Without gradients torch does not ask; the backward pass wants them."""
    kept = Kept()
    first = called(kept, efficient, with_gradients=False)
    assert first[1].numel() > 0
    kept.is_again = True
    for with_gradients in (False, True):  # once to be run once more, once to be differentiated
        again = called(kept, lambda: efficient(sums=True), with_gradients)
        assert [mine.untyped_storage()._cdata for mine in again] == [its.untyped_storage()._cdata for its in first]
    assert kept.tensors() == []


def test_what_is_not_what_it_was_is_made_again() -> None:
    """Weights dropped out, another kernel, a result that somebody has written into, a call too many."""

    def keeps(first: Any, second: Any, between: Any = lambda result: None) -> bool:
        kept = Kept()
        result = called(kept, first, with_gradients=False)
        between(result)
        kept.is_again = True
        return called(kept, second)[0].untyped_storage()._cdata == result[0].untyped_storage()._cdata

    def flash() -> Any:
        return torch.ops.aten._scaled_dot_product_flash_attention(QUERIES, QUERIES, QUERIES)

    assert keeps(flash, flash)
    assert keeps(efficient, efficient)
    assert not keeps(lambda: efficient(dropout=0.1), lambda: efficient(dropout=0.1))
    assert not keeps(efficient, flash)
    assert not keeps(flash, flash, lambda result: result[0].add_(1))
    kept = Kept(is_again=True)
    assert called(kept, flash)[0].shape == QUERIES.shape


@pytest.mark.parametrize("lengths", [(30,), (9, 17, 4)])
@pytest.mark.parametrize(
    ("asked", "operation"),
    [({"softcap": 2.0}, "aten::logsumexp"), ({"s_aux": torch.tensor([0.5, 1.0])}, FLASH)],
    ids=["capped", "with sinks"],
)
def test_what_no_kernel_of_torch_makes_is_kept_too(
    asked: dict[str, Any], operation: str, lengths: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(1, heads, 30, 8, requires_grad=True) for heads in (2, 1, 1)]

    def attend() -> torch.Tensor:
        return document_attention(SimpleNamespace(), *inputs, None, document_lengths=lengths, scaling=0.3, **asked)[0]

    kept = Kept()
    with torch.no_grad(), kept_attention.of_layer(kept):
        attend()
    kept.is_again = True
    with Ran() as ran, kept_attention.of_layer(kept):
        output = attend()
    assert ran.times[operation] == 0
    expected = attend()
    assert torch.equal(output, expected)
    for mine, its in zip(*(torch.autograd.grad(each.sin().sum(), inputs) for each in (output, expected)), strict=True):
        assert torch.equal(mine, its)


@pytest.mark.parametrize(
    ("card", "dtype", "lengths", "sums"),
    [
        ((8, 9), "bfloat16", (200,), 200),  # flash
        ((8, 9), "bfloat16", (70, 130), 200),  # varlen_attn
        ((7, 5), "float16", (200,), 224),  # memory-efficient: the sums in whole blocks of 32
        ((7, 5), "bfloat16", (200,), None),  # math
    ],
)
def test_a_forecast_knows_what_a_card_keeps(
    card: Capability, dtype: str, lengths: tuple[int, ...], sums: int | None
) -> None:
    config = tiny_config(num_hidden_layers=3)
    batch, on = BatchShape(lengths, 10), Techniques(recomputed_layers=3)
    held = trace(config, recipe_for("demo"), dtype, on, batch, card).peaks[LOSS].device.get(PART, 0)
    heads, width = config.num_attention_heads, config.hidden_size
    assert held == (0 if sums is None else 3 * (block_bytes(2 * 200 * width) + block_bytes(4 * heads * sums)))


@pytest.mark.long
def test_what_few_layers_keep_stands_for_many() -> None:
    """Every phase, against a trace of all layers."""
    config, batch = tiny_config(num_hidden_layers=7), BatchShape((50, 30), 60)
    passes = forecaster(config, recipe_for("demo"), "bfloat16", (8, 6), 0).passes
    for recomputed, again in ((7, 0), (7, 3), (7, 7), (5, 0), (5, 2)):
        techniques = Techniques(recomputed, recomputed_attention=again)
        whole = trace(config, recipe_for("demo"), "bfloat16", techniques, batch, (8, 6)).peaks
        for phase, peak in passes.peaks(techniques, batch).items():
            traced = sum(size for part, size in whole[phase].device.items() if part != "standing")
            assert sum(peak.device.values()) == pytest.approx(traced, rel=0.005), (recomputed, again, phase)
        assert passes.peaks(techniques, batch)[LOSS].device[PART] == whole[LOSS].device.get(PART, 0)


def test_a_plan_that_does_not_say_ran_attention_again() -> None:
    """One from before there was anything else, with the room that this took."""
    before = {name: value for name, value in asdict(KEPT).items() if name != "recomputed_attention"}
    assert Techniques.planned(before) == AGAIN
    assert Techniques.planned(asdict(KEPT)) == KEPT
    with pytest.raises(TypeError):
        Techniques.planned({"levitation": True})
