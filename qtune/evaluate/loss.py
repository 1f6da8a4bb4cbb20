"""The held-out loss: mean negative log-likelihood in nats per trained token, over all rows at once."""

from collections.abc import Sequence

import torch
from peft import PeftModel
from trl.trainer.utils import add_fused_lm_head

from qtune.data.packing import PackedRow, collate
from qtune.memory import tiled_loss
from qtune.model.base import autocast


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, rows: Sequence[PackedRow], device: str, compute_dtype: str) -> float:
    """Sum of losses over sum of trained tokens; a row is one pack, run on its own, so memory is a pack's.

    The loss is made as in training: in tiles, the (T, vocabulary) logits never whole.
    """
    was_training = model.training
    model.eval()
    nats = tokens = 0.0
    with autocast(device, compute_dtype):
        for row in rows:
            batch = {name: to_device(value, device) for name, value in collate([row]).items()}
            loss, count = _summed(model, batch)
            nats, tokens = nats + loss.item(), tokens + count.item()
    model.train(was_training)
    return nats / tokens


def _summed(model: torch.nn.Module, batch: dict[str, object]) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed loss in nats and the number of trained tokens."""
    if tiled_loss.suits(model):
        output = model(**batch, tiled_loss=True)
        return output.nats, output.tokens
    with_fused_head(model)
    output = model(**batch, fused_lm_head=True, use_cache=False)
    return -output.log_probs.sum(), output.label_mask.sum()


def to_device(value: object, device: str) -> object:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def with_fused_head(model: torch.nn.Module) -> None:
    """Give the causal model under `model` trl's fused head, unless the trainer has done so already."""
    causal = model.get_base_model() if isinstance(model, PeftModel) else model
    code = getattr(causal.forward, "__code__", None)
    if code is None or code.co_name != "_fused_forward":
        add_fused_lm_head(causal)
