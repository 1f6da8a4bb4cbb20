"""Packed documents in layers that mix tokens by something else than attention: each is what it is alone."""

from typing import Any

import made_models
import pytest
import torch
from made_models import (
    HYBRIDS,
    OWN_ATTENTION,
    PACK,
    Pass,
    adapted,
    assert_close,
    base,
    batch,
    one_pass,
    switched,
    trained,
)
from peft import PeftModel
from transformers.models.bamba import modeling_bamba

from qtune.memory import packed_mixers
from qtune.memory.engine import refusals
from qtune.memory.gradient_checkpointing import find_layers
from qtune.memory.split_batch import split_batch
from qtune.memory.techniques import Techniques

ROUNDING = 2e-5  # of a gradient's norm in float32; the mildest leak seen moved one by 0.3


def one_by_one(model: PeftModel, inputs: dict[str, Any]) -> Pass:
    """The same as `one_pass`, of each document in a pass of its own."""
    model.train()
    nats = sum(made_models.forward(model, piece) for piece in split_batch(inputs, len(PACK)))
    nats.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return Pass(nats.item(), found)


# Every one of them ran on from document to document, and one handed no keyword on to its attention.
@pytest.mark.parametrize("kind", HYBRIDS)
def test_loss_and_gradients_of_a_pack_are_those_of_its_documents(kind: str) -> None:
    """Recomputed layers too, which run again when nobody says any more how the row was packed."""
    alone = one_by_one(adapted(base(kind)), batch())
    model = adapted(base(kind))
    assert_close(one_pass(model, batch()), alone, ROUNDING)
    switched(model, Techniques(recomputed_layers=2))
    assert_close(one_pass(model, batch()), alone, ROUNDING)


# Nobody tells such attention where one document ends and the next begins, and ALiBi counted on from the row's start.
@pytest.mark.parametrize("kind", OWN_ATTENTION)
def test_a_base_whose_attention_is_its_own_runs_in_buckets_as_a_whole(kind: str) -> None:
    alone = one_by_one(adapted(base(kind)), batch())
    model = adapted(base(kind))
    assert_close(one_pass(model, batch()), alone, ROUNDING)
    assert "host_checkpoints" in refusals(model)
    if find_layers(model):
        switched(model, Techniques(recomputed_layers=4, streamed_layers=2))
        assert_close(one_pass(model, batch()), alone, ROUNDING)


def test_what_is_found_carries_a_state_and_is_not_attention() -> None:
    found = {kind: {type(each).__name__ for each in packed_mixers.token_mixers(base(kind))} for kind in HYBRIDS}
    assert found["mamba 2 beside attention"] == {"FalconH1Mixer"}
    assert found["convolution"] == {"Lfm2ShortConv"}
    assert found["rwkv"] == {"RwkvSelfAttention", "RwkvFeedForward"}
    assert not {type(each).__name__ for each in packed_mixers.token_mixers(base("llama"))}
    assert not [names for names in found.values() if any(name.endswith(("Layer", "Block")) for name in names - MIXERS)]


MIXERS = {"xLSTMLayer", "RecurrentGemmaRecurrentBlock"}  # mixers in spite of their names


def test_documents_of_like_length_are_one_call_of_a_mixer() -> None:
    model, shapes = adapted(base("convolution")), []
    mixer = next(packed_mixers.token_mixers(model))
    mixer.conv.register_forward_hook(lambda conv, inputs, output: None)
    mixer.in_proj.register_forward_hook(lambda linear, inputs, output: shapes.append(tuple(inputs[0].shape[:2])))
    model.eval()
    with torch.no_grad():
        made_models.forward(model, batch((23, 9, 1, 30)))
    assert shapes == [(2, 30), (1, 9), (1, 1)]


def test_the_gradient_of_padding_reaches_nobody() -> None:
    """A document's last token is repeated as padding; had that a gradient, the token's would be another."""
    model = adapted(base("gated delta net"))
    pack = one_pass(model, batch((17, 30)))
    assert_close(pack, Pass(pack.nats, one_pass(adapted(base("gated delta net")), batch((17, 30))).gradients), 0)
    assert len(trained(model)) == len(pack.gradients)


# mamba-ssm's kernel would be handed packed weights, and no adapter on the output projection would be asked.
def test_a_mixer_in_training_calls_its_projections(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were read past their adapters")

    monkeypatch.setattr(modeling_bamba, "mamba2_split_conv1d_scan_combined", refuse)
    model = adapted(base("mamba 2"))
    assert any(".out_proj.lora_A" in name for name in one_pass(model, batch()).gradients)
    assert next(packed_mixers.token_mixers(model)).training
