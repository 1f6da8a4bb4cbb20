"""Ten steps over packs, beside a loop over single documents that is written out in float64, for each kind of attention.

The loop has nothing of qtune: the model's own eager attention, peft's adapter, torch's cross-entropy and AdamW.
"""

import pytest
import torch
from attention_kinds import KINDS, made
from made_models import adapted, batch, switched, trained
from peft import PeftModel
from torch.nn.functional import cross_entropy

from qtune.memory import fused_cross_entropy, fused_layers
from qtune.memory.techniques import Techniques
from qtune.model.adapter import linear_names

STEPS, RATE = 10, 1e-3
PACKS = ((5, 9, 21, 1, 3, 17), (30, 2, 11), (40,))
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"}
ALWAYS = {"gpt_oss", "gemma2", "gemma4_text sharing keys", "llama4_text"}  # some two seconds each
MOST_APART = 1e-6  # of the loss, which is about 5.6 nats a token


def of_packs(model: PeftModel) -> list[float]:
    """Mean nats a token of each step: float32, fused layers and loss, layers recomputed in the backward pass."""
    layers = len(switched(model, Techniques()).layers)
    if layers:
        switched(model, Techniques(recomputed_layers=layers, tile_tokens=16))
    model.train()
    optimizer = torch.optim.AdamW(trained(model), lr=RATE)
    losses = []
    for step in range(STEPS):
        output = model(**batch(PACKS[step % len(PACKS)], seed=step % len(PACKS)), fused_loss=True)
        loss = output.nats / output.tokens
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def of_documents(model: PeftModel) -> list[float]:
    """The same in float64, one document after another."""
    optimizer = torch.optim.AdamW(trained(model), lr=RATE)
    losses = []
    for step in range(STEPS):
        pack = batch(PACKS[step % len(PACKS)], seed=step % len(PACKS))
        tokens, total = int((pack["labels"][:, 1:] != -100).sum()), 0.0
        lengths = pack["document_lengths"]
        for ids, labels in zip(pack["input_ids"].split(lengths, 1), pack["labels"].split(lengths, 1), strict=True):
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            nats = cross_entropy(logits, labels[0, 1:], reduction="sum") / tokens
            nats.backward()
            total += nats.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in ALWAYS else pytest.mark.long) for kind in sorted(KINDS)]
)
def test_ten_steps_of_packs_are_those_of_documents_alone_in_float64(kind: str) -> None:
    plain, ours = (model.requires_grad_(False) for model in made(kind))
    fused_layers.install(ours)
    fused_cross_entropy.install(ours)
    assert fused_cross_entropy.suits(ours)
    targets = sorted(linear_names(ours) & ATTENTION)
    tuned, reference = (adapted(model, target_modules=targets, target_parameters=None) for model in (ours, plain))
    plain.set_experts_implementation("eager")  # grouped products know no float64
    found, expected = of_packs(tuned), of_documents(reference.double().train())
    assert expected[0] - expected[9] > 1e-3  # of the same pack: it learns, or nothing would be shown
    for mine, right in zip(found, expected, strict=True):
        assert abs(mine - right) <= MOST_APART * right
