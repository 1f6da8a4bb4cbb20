"""The held-out loss against a cross-entropy written by hand in float64."""

import pytest
import torch

from qtune.evaluate.loss import held_out_loss, with_fused_head
from qtune.memory import tiled_loss
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
    assert held_out_loss(model, ROWS, "cpu", "float32") == pytest.approx(expected, abs=1e-6)


def test_how_rows_are_packed_does_not_matter(tiny_base) -> None:
    model = base.load_base(Model(base=str(tiny_base)), "cpu", "float32")
    joined = {key: ROWS[0][key] + ROWS[1][key] for key in ROWS[0]}
    apart, together = (held_out_loss(model, rows, "cpu", "float32") for rows in (ROWS, [joined]))
    assert together == pytest.approx(apart, abs=1e-6)


def test_the_mode_is_left_as_it_was(tiny_base) -> None:
    model = adapter.attach(base.load_base(Model(base=str(tiny_base)), "cpu", "float32"), Lora(rank=4), 0).train()
    held_out_loss(model, ROWS, "cpu", "float32")
    assert model.training


def test_a_head_without_tiles_goes_through_trls_and_gives_the_same(tiny_base, monkeypatch) -> None:
    model = base.load_base(Model(base=str(tiny_base)), "cpu", "float32")
    tiled = held_out_loss(model, ROWS, "cpu", "float32")
    monkeypatch.setattr(tiled_loss, "suits", lambda model: False)
    assert held_out_loss(model, ROWS, "cpu", "float32") == pytest.approx(tiled, abs=1e-6)
    forward = model.forward
    with_fused_head(model)
    assert model.forward == forward
