"""The held-out loss: mean negative log-likelihood in nats per trained token, over all rows at once."""

from collections.abc import Sequence

import torch
from peft import PeftModel
from trl.trainer.utils import add_fused_lm_head

from qtune.data.packing import PackedRow, collate
from qtune.model.base import autocast


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, rows: Sequence[PackedRow], device: str, compute_dtype: str) -> float:
    """Sum of losses over sum of trained tokens; a row is one pack, run on its own, so memory is a pack's.

    The head is trl's fused one, as in training: the (T, vocabulary) logits are never whole.
    """
    was_training = model.training
    model.eval()
    with_fused_head(model)
    nats = tokens = 0.0
    with autocast(device, compute_dtype):
        for row in rows:
            batch = {name: to_device(value, device) for name, value in collate([row]).items()}
            output = model(**batch, fused_lm_head=True, use_cache=False)
            nats -= output.log_probs.double().sum().item()
            tokens += output.label_mask.sum().item()
    model.train(was_training)
    return nats / tokens


def to_device(value: object, device: str) -> object:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def with_fused_head(model: torch.nn.Module) -> None:
    """Give the causal model under `model` trl's fused head, unless the trainer has done so already."""
    causal = model.get_base_model() if isinstance(model, PeftModel) else model
    code = getattr(causal.forward, "__code__", None)
    if code is None or code.co_name != "_fused_forward":
        add_fused_lm_head(causal)
