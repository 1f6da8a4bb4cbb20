"""The loss without the logits: head and cross-entropy in tiles of tokens, the gradient made on the way.

Held less of: the (T, V) logits and their gradient; a tile of them lives at a time, for labelled positions only. What
is kept for the backward pass is one (N, H) gradient of the hidden states.
Costs: nothing; the logits are made once, where recomputing them in the backward pass makes them twice.
Refuses: a head that is trained, has a bias, or of whose product something else is made than scaled and capped logits
(`head_logits`; `suits` says no); trl's own fused head is used there.

The gradient of the cross-entropy does not depend on what follows but for a factor, so it can be made in the forward
pass (the idea of Liger's fused linear cross-entropy, Hsu et al. 2024, arXiv:2410.10989, section 3).

Letters: T tokens of a row, N of them labelled, H hidden, V vocabulary.
"""

import functools
import types
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from qtune.data.rows import NOT_TRAINED
from qtune.memory import head_logits, memory_tracker, output_head, trained_rows
from qtune.memory.chunked_cross_entropy import TILE_ROWS, of_sliced_head, tile_rows
from qtune.memory.head_logits import PLAIN, MadeOf
from qtune.memory.nf4 import is_quantized
from qtune.memory.trained_rows import HeadRows
from qtune.units import MIB

TILE_BYTES = 64 * MIB
MOST_ROWS = 512  # of a larger tile: a card's arithmetic takes longer than reading the head by then
SHARE_OF_ROWS = 8  # a tile of an eighth of all rows is no more than a layer holds in its backward pass (Llama-3.1-8B)


@dataclass
class SummedLoss(ModelOutput):
    """`nats`: the summed loss of all labelled tokens, a scalar, or the loss of each, (N,); `tokens`: how many there
    are. Where they have weights both are of what each counts for."""

    nats: torch.Tensor | None = None
    tokens: torch.Tensor | None = None


def suits(model: PreTrainedModel | PeftModel) -> bool:
    """Whether the head of a causal model, with an adapter on it or not, is one that this loss can stand in for."""
    causal = model.get_base_model() if isinstance(model, PeftModel) else model
    head = causal.get_output_embeddings()
    is_plain = isinstance(head, torch.nn.Linear) and head.bias is None and not head.weight.requires_grad
    return is_plain and head_logits.made_of(causal) is not None


def install(model: PreTrainedModel) -> None:
    """Let `model(**batch, labels=labels, fused_loss=True)` return a SummedLoss, with `of_each` that of each token. Any
    other call is its own forward."""
    original = model.forward

    @functools.wraps(type(model).forward)  # generate() checks its arguments against this signature
    def forward(
        self: PreTrainedModel,
        *args: Any,
        fused_loss: bool = False,
        of_each: bool = False,
        labelled: torch.Tensor | None = None,
        token_weights: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_loss:
            return original(*args, **kwargs)
        labels = kwargs.pop("labels")
        hidden = head_logits.decoder_of(self)(*args, **{**kwargs, "use_cache": False}).last_hidden_state
        memory_tracker.enter_phase("loss")
        with memory_tracker.part_of_new("loss"):
            made = head_logits.made_of(self) or PLAIN
            head = self.get_output_embeddings()
            return summed_loss(hidden, head, labels, labelled, made, of_each, token_weights)

    model.forward = types.MethodType(forward, model)


def summed_loss(
    hidden: torch.Tensor,
    head: torch.nn.Module,
    labels: torch.Tensor,
    labelled: torch.Tensor | None = None,
    made: MadeOf = PLAIN,
    of_each: bool = False,
    token_weights: torch.Tensor | None = None,
) -> SummedLoss:
    """Loss of predicting each next label from `hidden` (B, T, H) by the linear `head`, of whose products the logits are
    `made`; `labels` are (B, T), and so are the `token_weights` of what each of them counts for, where they differ.
    Summed up, or `of_each` labelled token.

    `labelled` (N,) are the flat positions before a label, found from `labels` unless given: a forecast has no labels.
    """
    if labelled is None:
        labelled = positions_before_labels(labels)
    wanted = labels.flatten().index_select(0, labelled + 1)
    chosen = hidden.flatten(0, 1).index_select(0, labelled)
    place = trained_rows.place_of(head)
    trained = None if place is None else place.rows
    weights = None if token_weights is None else token_weights.flatten().index_select(0, labelled + 1)
    nats = _TiledCrossEntropy.apply(chosen, head, wanted, made, trained, of_each or weights is not None)
    if weights is None:
        return SummedLoss(nats=nats, tokens=labelled.new_tensor(len(labelled)))
    assert not of_each, "pairs have no weights"
    return SummedLoss(nats=(nats * weights).sum(), tokens=weights.sum())


def positions_before_labels(labels: torch.Tensor) -> torch.Tensor:
    """Flat positions (N,) of (B, T) `labels` whose next position in the same row has a label."""
    has_next = torch.zeros_like(labels, dtype=torch.bool)
    has_next[:, :-1] = labels[:, 1:] != NOT_TRAINED
    return has_next.flatten().nonzero().flatten()


class _TiledCrossEntropy(torch.autograd.Function):
    """Cross-entropy in float32 of the logits of `hidden` (N, H) against `labels` (N,); summed up, or (N,) `of_each`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: torch.nn.Module,
        labels: torch.Tensor,
        made: MadeOf,
        trained: torch.Tensor | None,
        of_each: bool,
    ) -> torch.Tensor:
        assert not head.weight.requires_grad, "the head is frozen"
        rows = HeadRows.of(head) if trained is not None else None
        assert rows is None or not of_each, "the gradient of trained rows is that of the sum"
        nats, gradient = _of_head(hidden, head, labels, ctx.needs_input_grad[0], made, rows, of_each)
        ctx.save_for_backward(gradient, None if rows is None else rows.gradient)
        return nats

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None, None, torch.Tensor | None, None]:
        gradient, of_rows = ctx.saved_tensors
        of_rows = None if of_rows is None else of_rows * upstream.float()
        return gradient * upstream.to(gradient.dtype).unsqueeze(-1), None, None, None, of_rows, None


def _of_head(
    hidden: torch.Tensor,
    head: Any,
    labels: torch.Tensor,
    with_gradient: bool,
    made: MadeOf,
    rows: HeadRows | None,
    of_each: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Summed loss, or that `of_each`, and its gradient (N, H), by the way that suits where the head is; that of its
    trained `rows` is added up in them."""
    if not (is_quantized(head) or output_head.is_on_host(head)):
        return of_weight(hidden, head.weight, labels, with_gradient, made, rows, of_each)
    assert rows is None, "a head with trained rows stays on the device"
    if is_quantized(head):
        return of_sliced_head(hidden, output_head.sliced_nf4(head, hidden), labels, with_gradient, made, of_each)
    slices = output_head.sliced_on_host(head, hidden.device)
    if len(slices.parts) == 1:
        ((_, weight),) = slices.visits(1)
        return of_weight(hidden, weight, labels, with_gradient, made, None, of_each)
    return of_sliced_head(hidden, slices, labels, with_gradient, made, of_each)


def rows_of_a_tile(rows: int, vocabulary: int) -> int:
    """How many of `rows` go at once. The whole head is read for each tile, so the fewer tiles the better.

    It grows with the rows, as what a layer holds does: a tile is not the peak of a step that recomputes its layers.
    """
    larger = min(MOST_ROWS, rows // SHARE_OF_ROWS) // TILE_ROWS * TILE_ROWS
    return max(tile_rows(TILE_BYTES, vocabulary), larger)


def of_weight(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    with_gradient: bool,
    made: MadeOf = PLAIN,
    rows: HeadRows | None = None,
    of_each: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Summed loss, or that `of_each` token (N,), and its gradient (N, H), in tiles of tokens over the whole vocabulary
    of `weight` (V, H)."""
    nats = torch.zeros(len(hidden) if of_each else (), device=hidden.device)
    gradient = torch.empty_like(hidden) if with_gradient else None
    for tile in memory_tracker.tiles(len(hidden), rows_of_a_tile(len(hidden), weight.shape[0]), hidden):
        logits = _products(hidden[tile].to(weight.dtype), weight, rows).float()
        logits, slopes = made.bend_(logits, with_slopes=gradient is not None)
        own = labels[tile, None]
        logits -= logits.amax(dim=1, keepdim=True)  # in place from here on: one tile of float32, not three
        own_logits = logits.gather(1, own)
        p = logits.exp_()
        total = p.sum(dim=1, keepdim=True)
        if of_each:
            nats[tile] = (total.log() - own_logits)[:, 0]
        else:
            nats -= own_logits.sum()
            nats += total.log().sum()
        if gradient is not None:
            p /= total  # the logits' gradient is p - 1 at the label and p elsewhere
            p.scatter_add_(1, own, torch.full_like(total, -1.0))
            of_products = made.back_(p, slopes).to(weight.dtype)
            of_own = None if rows is None else rows.take_from(of_products, hidden[tile].to(weight.dtype))
            gradient[tile] = of_products @ weight
            if of_own is not None:
                gradient[tile] += of_own
            del of_products
        del logits, p, slopes  # or the next tile's are made beside them
    return nats, gradient


def _products(hidden: torch.Tensor, weight: torch.Tensor, rows: HeadRows | None) -> torch.Tensor:
    products = hidden @ weight.t()
    if rows is not None:
        rows.put_into(products, hidden)
    return products
