"""How many operations a document costs, counted by hand, and what they come to at the rates of a processor."""

from dataclasses import replace

import pytest
import torch
from arithmetic import ATTENTION, LAYERS, MLP, STANDING, ladder_of
from conftest import tiny_config
from real_steps import recipe_for

from qtune.hardware import Device
from qtune.memory.memory_tracker import MovedBytes
from qtune.memory.techniques import Techniques
from qtune.plan import activation_memory, fake_model, throughput
from qtune.plan.throughput import Rates, _operations
from qtune.plan.workload import BatchShape, Work
from qtune.units import GIB


def test_a_token_costs_its_weights_and_its_attention() -> None:
    """4 operations a frozen weight and token, 6 a trained one; of attention, forward and 2.5 times that backward."""
    tokens, heads_channels = 100, STANDING.attention_width
    weights = 4 * (STANDING.active_parameters + STANDING.head_parameters) + 6 * STANDING.trained_parameters
    forward = LAYERS * 2 * 2 * tokens * heads_channels / 2  # two products, of which a token sees half
    attention = (1 + 2.5) * forward
    one, other = BatchShape.of_one_document(tokens), BatchShape.of_one_document(7)
    alone = _operations(STANDING, Work((one,)))
    assert alone == tokens * (weights + attention)
    assert _operations(STANDING, Work((one, other))) == alone + _operations(STANDING, Work((other,)))
    wider = replace(STANDING, attention_width=2 * heads_channels)
    assert _operations(wider, Work((one,))) == tokens * (weights + 2 * attention)


def test_a_processor_does_each_kind_of_work_at_a_rate_of_its_own(monkeypatch) -> None:
    """Products at 1e9 operations a second, an adapter's at half of that, attention at a tenth; 1e8 bytes moved."""
    asked = []

    def rates(*of: object) -> Rates:
        asked.append(of)
        return Rates(adapter_operations=5e8, attention_operations=1e8, moved_bytes=1e8)

    monkeypatch.setattr(throughput, "_rates", rates)
    batch = BatchShape((100, 300), labelled=200)
    ladder = ladder_of(Work((batch, batch)), gradient_accumulation=2, micro_batch=1)
    processor = Device("cpu", "CPU", GIB, GIB, "float32", operations_per_second=1e9)
    speed = throughput.estimate(ladder, 0.0, processor, "float32", steps=5)

    pairs = 100 * 100 + 300 * 300
    frozen = 4 * (STANDING.active_parameters + STANDING.head_parameters) * 400 / 1e9
    trained = 6 * STANDING.trained_parameters * 400 / 5e8
    attention = 3.5 * 2 * STANDING.attention_width * LAYERS * pairs / 1e8
    layers = LAYERS * 10 * (MLP + ATTENTION) * 400 / 1e8  # what `arithmetic.FormulaPasses` moves
    logits = 200 * STANDING.head_parameters / STANDING.attention_width * throughput.LOGIT_BYTES / 1e8
    seconds = frozen + trained + attention + layers + logits
    assert speed.tokens_per_second == pytest.approx(400 / seconds)
    assert speed.total_seconds == pytest.approx(5 * 2 * seconds)
    rank = ladder.recipe.lora.rank
    assert asked == [("float32", STANDING.attention_width, rank, pairs // 400)]  # attention is tried at such documents


def test_rates_are_tried_and_kept() -> None:
    rates = throughput._rates("float32", 64, 8, 32)
    assert all(value > 1e6 for value in vars(rates).values())
    assert throughput._rates("float32", 64, 8, 32) is rates


def test_bytes_that_layers_move_grow_with_their_number() -> None:
    """A trace of some layers stands for all of them."""
    batch, config, recipe = BatchShape((24, 40), 60), tiny_config(num_hidden_layers=5), recipe_for("demo")
    passes = activation_memory.forecaster(config, recipe, "float32", None, 0).passes
    counter = MovedBytes()
    activation_memory.trace(
        fake_model.shallow(config, 5), recipe, "float32", Techniques(), batch, card=None, counter=counter
    )
    assert passes.moved_bytes(Techniques(), batch) == pytest.approx(counter.moved, rel=0.05)
    assert counter.moved > 0


def test_what_an_operation_moves_is_read_and_written_once() -> None:
    """Views move nothing, and neither do products here: those have a rate of their own."""
    x, weight = torch.ones(8, 16, requires_grad=True), torch.ones(16, 4)
    with MovedBytes() as counter:
        counter.enter_phase("forward")
        y = (x * x).t()  # 3 x 512 bytes
        z = (y.t() @ weight).to(torch.float64)  # 128 read, 256 written
        assert counter.moved == 3 * 512 + 128 + 256
        counter.enter_phase("loss")
        loss = (z * z).sum()
        assert counter.moved == 3 * 512 + 128 + 256  # the loss's own is not a layer's
        before = counter.moved
        loss.backward()
    assert counter.moved > before
