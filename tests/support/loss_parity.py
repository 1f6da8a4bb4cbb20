"""The same training twice: packs in float32 as qtune runs them, and one document at a time in float64, by hand."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from made_models import adapted, base, batch, forward, made, switched, trained
from peft import PeftModel

from qtune.memory.split_batch import split_batch
from qtune.memory.techniques import Techniques
from qtune.model.packing_probe import own_attention

STEPS = 10
RATE, BETAS, EPSILON = 1e-3, (0.9, 0.999), 1e-8
PACKS: Sequence[Sequence[int]] = ((23, 9, 1, 30), (17, 16), (5, 40, 5))


def losses_of_packs(model: PeftModel, steps: int = STEPS, techniques: Techniques | None = None) -> list[float]:
    """Mean nats a labelled token of each step, a pack a step, with AdamW of torch; under `techniques`."""
    switched(model, techniques or Techniques())
    model.train()
    optimizer = torch.optim.AdamW(trained(model), RATE, BETAS, EPSILON, weight_decay=0.0)
    losses = []
    for pack in _packs(steps):
        loss = forward(model, pack) / _labels(pack)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def losses_by_hand(model: PeftModel, steps: int = STEPS) -> list[float]:
    """The same of transformers' own attention, no document ever beside another, and Adam written out (Kingma and Ba
    2015, algorithm 1)."""
    weights = trained(model)
    first, second = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))
    losses = []
    for step, pack in enumerate(_packs(steps), start=1):
        nats = 0.0
        for document in split_batch(pack, len(pack["document_lengths"])):
            logits = model(input_ids=document["input_ids"], use_cache=False).logits[0, :-1].double()
            loss = torch.nn.functional.cross_entropy(logits, document["labels"][0, 1:], reduction="sum") / _labels(pack)
            if loss.requires_grad and len(logits):
                loss.backward()
            nats += loss.item()
        with torch.no_grad():
            for weight, mean, square in zip(weights, first, second, strict=True):
                mean.lerp_(weight.grad, 1 - BETAS[0])
                square.lerp_(weight.grad.square(), 1 - BETAS[1])
                unbiased = mean / (1 - BETAS[0] ** step), square / (1 - BETAS[1] ** step)
                weight -= RATE * unbiased[0] / (unbiased[1].sqrt() + EPSILON)
                weight.grad = None
        losses.append(nats)
    return losses


def both(kind: str, techniques: Techniques | None = None) -> tuple[list[float], list[float]]:
    """Losses of packs and by hand of a made model with the same adapter."""
    ours = base(kind)
    plain = made(kind).double()  # nothing of qtune in it
    plain.config._experts_implementation = "eager"  # the others do not multiply float64
    plain.load_state_dict(ours.state_dict())
    ours, plain = adapted(ours), adapted(plain.requires_grad_(False))
    for weight, exact in zip(trained(ours), trained(plain), strict=True):
        exact.data = weight.detach().double()
    with own_attention(plain):
        by_hand = losses_by_hand(plain.train())
    return losses_of_packs(ours, techniques=techniques), by_hand


def _packs(steps: int) -> Iterator[dict[str, Any]]:
    for step in range(steps):
        yield batch(PACKS[step % len(PACKS)], seed=step % len(PACKS))


def _labels(pack: dict[str, Any]) -> int:
    return int((pack["labels"][:, 1:] != -100).sum())
