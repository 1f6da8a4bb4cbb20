"""The held-out loss: mean negative log-likelihood in nats per trained token, over all rows at once."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from peft import PeftModel
from trl.trainer.utils import add_fused_lm_head

from qtune.data.packing import PackedRow, collate
from qtune.distributed.ranks import ALONE, Ranks
from qtune.memory import fused_cross_entropy
from qtune.memory.oom_recovery import Batch, Recovery, is_out_of_memory, let_go
from qtune.memory.split_batch import split_batch
from qtune.model.loaded import Loaded

T = TypeVar("T")


def _as_it_is(batch: Batch) -> Batch:
    return batch


def held_out_loss(
    loaded: Loaded, rows: Sequence[PackedRow], recovery: Recovery | None = None, ranks: Ranks = ALONE
) -> float:
    """Sum of losses over sum of trained tokens; a row is one pack, run on its own, so memory is a pack's.

    The loss is made as in training: in tiles, the (T, vocabulary) logits never whole. A pack that runs out of memory is
    run again with what `recovery` can give up, in pieces at the least; raises OutOfMemory when that does not help.
    Of several ranks each runs its share, and all add up the same numbers in the same order as one would.
    """
    return _mean(_summed_packs(loaded, rows, recovery, ranks))


def losses_by_source(
    loaded: Loaded,
    rows: Sequence[PackedRow],
    sources: Sequence[str],
    recovery: Recovery | None = None,
    ranks: Ranks = ALONE,
) -> tuple[float, dict[str, float]]:
    """The same, and the losses over the rows of each of `sources`, which name that of every pack; none where there are
    no names."""
    summed = _summed_packs(loaded, rows, recovery, ranks)
    named = list(zip(sources, summed, strict=True)) if sources else []
    return _mean(summed), {
        source: _mean([each for name, each in named if name == source]) for source in dict.fromkeys(sources)
    }


def _mean(summed: Sequence[tuple[float, float]]) -> float:
    nats = tokens = 0.0
    for loss, count in summed:
        nats, tokens = nats + loss, tokens + count
    return nats / tokens


def _summed_packs(
    loaded: Loaded, rows: Sequence[PackedRow], recovery: Recovery | None, ranks: Ranks
) -> list[tuple[float, float]]:
    """Summed loss in nats and trained tokens of every pack, in order."""
    every = of_packs(loaded, rows, _summed, recovery or Recovery(), ranks)
    return [(sum(nats, 0.0), sum(tokens, 0.0)) for nats, tokens in (zip(*pieces, strict=True) for pieces in every)]


def of_packs(
    loaded: Loaded,
    rows: Sequence[PackedRow],
    of_piece: Callable[[Any, Batch], T],
    recovery: Recovery,
    ranks: Ranks,
    prepared: Callable[[Batch], Batch] = _as_it_is,
) -> list[list[T]]:
    """What `of_piece` finds in every pack, in as few pieces as memory allows, by JSON-like values; a piece is
    `prepared` on the host."""
    model = loaded.model
    was_training = model.training
    model.eval()
    try:
        with loaded.passes_together():
            ours = [_of_pack(loaded, collate([row]), of_piece, recovery, prepared) for row in ranks.share(rows)]
    finally:
        model.train(was_training)
    return ranks.in_order(ours)


def document_loss(loaded: Loaded, document: Sequence[int]) -> float:
    """The same of one document of token ids, of which every token but the first is a label."""
    row = PackedRow(input_ids=document, labels=document, seq_lengths=[len(document)])
    return held_out_loss(loaded, [row])


def _of_pack(
    loaded: Loaded,
    batch: Batch,
    of_piece: Callable[[Any, Batch], T],
    recovery: Recovery,
    prepared: Callable[[Batch], Batch],
) -> list[T]:
    while True:
        documents: tuple[int, ...] = ()
        found = []
        try:
            for piece in split_batch(batch, recovery.pieces, recovery.together):
                documents = piece["document_lengths"]
                on_device = {name: to_device(value, loaded.device) for name, value in prepared(piece).items()}
                with torch.no_grad(), loaded.autocast():
                    found.append(of_piece(with_fused_head(loaded.model), on_device))
            return found
        except Exception as fault:
            if not is_out_of_memory(fault):
                raise
            let_go(fault)
        recovery.after_pass("The held-out loss", "forward pass", documents)


def _summed(model: torch.nn.Module, batch: Batch) -> tuple[float, float]:
    """Summed loss in nats and the number of trained tokens."""
    if fused_cross_entropy.suits(model):
        output = model(**batch, fused_loss=True)
        return output.nats.item(), output.tokens.item()
    output = model(**batch, fused_lm_head=True, use_cache=False)
    return -output.log_probs.sum().item(), output.label_mask.sum().item()


def to_device(value: object, device: str) -> object:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def with_fused_head(model: Any) -> Any:
    """`model`, where ours does not allow tiles with trl's fused head, unless the trainer has given it one already."""
    causal = model.get_base_model() if isinstance(model, PeftModel) else model
    code = getattr(causal.forward, "__code__", None)
    if not fused_cross_entropy.suits(model) and (code is None or code.co_name != "_fused_forward"):
        add_fused_lm_head(causal)
    return model
