"""The held-out loss: mean negative log-likelihood in nats per trained token, over all rows at once."""

from collections.abc import Sequence

import torch
from peft import PeftModel
from trl.trainer.utils import add_fused_lm_head

from qtune.data.packing import PackedRow, collate
from qtune.distributed.ranks import ALONE, Ranks
from qtune.memory import fused_cross_entropy
from qtune.memory.oom_recovery import Batch, Recovery, is_out_of_memory, let_go
from qtune.memory.split_batch import split_batch
from qtune.model.loaded import Loaded


def held_out_loss(
    loaded: Loaded, rows: Sequence[PackedRow], recovery: Recovery | None = None, ranks: Ranks = ALONE
) -> float:
    """Sum of losses over sum of trained tokens; a row is one pack, run on its own, so memory is a pack's.

    The loss is made as in training: in tiles, the (T, vocabulary) logits never whole. A pack that runs out of memory is
    run again with what `recovery` can give up, in pieces at the least; raises OutOfMemory when that does not help.
    Of several ranks each runs its share, and all add up the same numbers in the same order as one would.
    """
    recovery, model = recovery or Recovery(), loaded.model
    was_training = model.training
    model.eval()
    nats = tokens = 0.0
    try:
        with loaded.passes_together():
            ours = [_summed_pack(loaded, collate([row]), recovery) for row in ranks.share(rows)]
    finally:
        model.train(was_training)
    for loss, count in ranks.in_order(ours):
        nats, tokens = nats + loss, tokens + count
    return nats / tokens


def document_loss(loaded: Loaded, document: Sequence[int]) -> float:
    """The same of one document of token ids, of which every token but the first is a label."""
    row = PackedRow(input_ids=document, labels=document, seq_lengths=[len(document)])
    return held_out_loss(loaded, [row])


def _summed_pack(loaded: Loaded, batch: Batch, recovery: Recovery) -> tuple[float, float]:
    """Summed loss in nats and trained tokens of one pack, in as few pieces as memory allows."""
    while True:
        documents: tuple[int, ...] = ()
        nats = tokens = 0.0
        try:
            for piece in split_batch(batch, recovery.pieces):
                documents = piece["document_lengths"]
                with torch.no_grad(), loaded.autocast():
                    loss, count = _summed(
                        loaded.model, {name: to_device(value, loaded.device) for name, value in piece.items()}
                    )
                nats, tokens = nats + loss.item(), tokens + count.item()
            return nats, tokens
        except Exception as fault:
            if not is_out_of_memory(fault):
                raise
            let_go(fault)
        recovery.after_pass("The held-out loss", "forward pass", documents)


def _summed(model: torch.nn.Module, batch: dict[str, object]) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed loss in nats and the number of trained tokens."""
    if fused_cross_entropy.suits(model):
        output = model(**batch, fused_loss=True)
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
