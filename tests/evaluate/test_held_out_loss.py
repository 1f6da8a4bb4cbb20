"""The held-out loss against a cross-entropy written by hand in float64."""

import pytest
import torch
from made_models import on_cpu

from qtune.errors import OutOfMemory
from qtune.evaluate.held_out_loss import held_out_loss, with_fused_head
from qtune.memory import fused_cross_entropy
from qtune.memory.oom_recovery import Recovery
from qtune.model import adapter, base
from qtune.recipe.schema import Lora, Model

ROWS = [
    {"input_ids": list(range(10, 30)), "labels": [-100] * 8 + [*range(18, 30)], "seq_lengths": [20]},
    {"input_ids": list(range(40, 75)), "labels": [-100, *range(41, 75)], "seq_lengths": [5, 30]},
]


def by_hand(model: torch.nn.Module, rows: list[dict]) -> float:
    """Mean over trained tokens of -log softmax in float64, one document at a time."""
    nats, count = 0.0, 0
    for row in rows:
        start = 0
        for length in row["seq_lengths"]:
            ids = torch.tensor(row["input_ids"][start : start + length])
            labels = row["labels"][start : start + length]
            logits = model(input_ids=ids[None]).logits[0].double()
            for position in range(length - 1):
                label = labels[position + 1]
                if label != -100:
                    nats -= torch.log_softmax(logits[position], -1)[label].item()
                    count += 1
            start += length
    return nats / count


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_it_is_the_cross_entropy_per_trained_token(tiny_base, quantization) -> None:
    model = base.load_base(Model(base=str(tiny_base), quantization=quantization), "cpu", "float32").eval()
    with torch.no_grad():
        expected = by_hand(model, ROWS)
    assert held_out_loss(on_cpu(model), ROWS) == pytest.approx(expected, abs=1e-6)


def test_how_rows_are_packed_does_not_matter(tiny_base) -> None:
    model = base.load_base(Model(base=str(tiny_base)), "cpu", "float32")
    joined = {key: ROWS[0][key] + ROWS[1][key] for key in ROWS[0]}
    apart, together = (held_out_loss(on_cpu(model), rows) for rows in (ROWS, [joined]))
    assert together == pytest.approx(apart, abs=1e-6)


def test_the_mode_is_left_as_it_was(tiny_base) -> None:
    model = adapter.attach(base.load_base(Model(base=str(tiny_base)), "cpu", "float32"), Lora(rank=4), 0).train()
    held_out_loss(on_cpu(model), ROWS)
    assert model.training


def test_a_head_without_tiles_goes_through_trls_and_gives_the_same(tiny_base, monkeypatch) -> None:
    model = base.load_base(Model(base=str(tiny_base)), "cpu", "float32")
    tiled = held_out_loss(on_cpu(model), ROWS)
    monkeypatch.setattr(fused_cross_entropy, "suits", lambda model: False)
    assert held_out_loss(on_cpu(model), ROWS) == pytest.approx(tiled, abs=1e-6)
    forward = model.forward
    with_fused_head(model)
    assert model.forward == forward


def fail_above(model: torch.nn.Module, tokens: int) -> None:
    """Let the model run out of memory on more than so many tokens at once."""

    def before_layer(layer: torch.nn.Module, arguments: tuple[torch.Tensor]) -> None:
        if arguments[0].shape[1] > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    model.model.layers[-1].register_forward_pre_hook(before_layer)


def joined(count: int) -> dict:
    return {key: (ROWS[0][key] + ROWS[1][key]) * count for key in ROWS[0]}


@pytest.mark.parametrize(("tokens", "pieces"), [(1000, 1), (110, 2), (60, 4), (30, 8)])
def test_a_pack_too_large_is_summed_in_pieces(tiny_base, tokens, pieces) -> None:
    model = base.load_base(Model(base=str(tiny_base)), "cpu", "float32").train()
    rows = [joined(4), ROWS[0], joined(2)]
    expected, told = held_out_loss(on_cpu(model), rows), []
    fail_above(model, tokens)
    recovery = Recovery(told.append)
    assert held_out_loss(on_cpu(model), rows, recovery) == pytest.approx(expected, abs=1e-6)
    assert held_out_loss(on_cpu(model), rows) == pytest.approx(expected, abs=1e-6)
    assert recovery.pieces == pieces
    assert 2 ** len(told) == pieces
    assert model.training


def test_a_document_too_large_asks_for_less_and_then_refuses(tiny_base) -> None:
    model = base.load_base(Model(base=str(tiny_base)), "cpu", "float32").train()
    fail_above(model, 29)
    asked = []
    with pytest.raises(OutOfMemory, match=r"one document of 30 tokens.*Set data\.max_tokens to 15"):
        held_out_loss(on_cpu(model), ROWS, Recovery(climb=lambda: asked.append(1) or None))
    assert len(asked) == 1
    assert model.training
