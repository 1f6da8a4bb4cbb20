"""The loss of pairs of answers: log-probabilities of whole answers, made of the loss of each token.

The documents of a batch are pairs, each a chosen and behind it a rejected conversation, which see nothing of one
another (`packed_attention`). The fused cross-entropy gives the nats of each token and keeps their gradient, of which
the backward pass scales the rows of an answer by what the loss makes of it: no logits are held, whatever the loss.

Held less of: a second model. Log-probabilities of the base are those of the same weights with the adapter off, in a
pass without gradient before the one that trains, of which nothing is left but one number a document.
Costs: that pass, a third of the time of a step that keeps its activations, for an objective that has a reference; none
without.
Refuses: pairs whose answers cannot be in one pass.

Letters: N tokens that are predicted, D documents, P pairs.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch

from qtune.data.rows import NOT_TRAINED
from qtune.memory import fused_cross_entropy, memory_tracker
from qtune.memory.oom_recovery import Batch
from qtune.train.objectives import Objective, Pairs

AsBase = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Layout:
    """Where in the N predicted tokens of a batch its documents are: `tokens` are as many of each, of which
    `answer_tokens` are in its answer."""

    tokens: tuple[int, ...]
    answer_tokens: tuple[int, ...]


def laid_out(batch: Batch, objective: Objective) -> Batch:
    """`batch` with what `pairs_of` needs, found on the host, as a card would have to be waited for.

    Where the objective reads the whole row of a chosen answer, all of it is predicted. `is_answer` (N,) tells the
    answers' tokens, 1, from the others, 0.
    """
    labels, lengths = batch["labels"], batch["document_lengths"]
    ends = [0, *accumulate(lengths)]
    predicted = labels
    if objective.reads_whole:
        predicted = labels.clone()
        for start, end in list(pairwise(ends))[::2]:
            predicted[:, start + 1 : end] = batch["input_ids"][:, start + 1 : end]
    labelled = fused_cross_entropy.positions_before_labels(predicted)
    is_answer = labels.flatten()[labelled + 1] != NOT_TRAINED
    owners = torch.bucketize(labelled, torch.tensor(ends[1:]), right=True)
    counts = (torch.bincount(each, minlength=len(lengths)).tolist() for each in (owners, owners[is_answer]))
    layout = Layout(*map(tuple, counts))
    return {**batch, "labels": predicted, "labelled": labelled, "is_answer": is_answer.float(), "layout": layout}


def totals_of(batches: Iterable[Batch]) -> tuple[int, int]:
    """How many pairs there are, and tokens of chosen rows that are predicted where whole rows are."""
    lengths = [batch["document_lengths"] for batch in batches]
    return sum(map(len, lengths)) // 2, sum(length - 1 for each in lengths for length in each[::2])


def pairs_of(model: torch.nn.Module, batch: Batch, objective: Objective, as_base: AsBase | None = None) -> Pairs:
    """The P pairs of a batch that is `laid_out`; what the objective reads of the base is found within `as_base`, where
    that is given."""
    of_base: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
    if as_base is not None and objective.has_reference:
        of_base = _of_base(model, batch, as_base)
    whole, answers = _log_probabilities(model, batch)
    tokens = answers.new_tensor(batch["layout"].answer_tokens)
    return Pairs(answers[::2], answers[1::2], tokens[::2], tokens[1::2], whole[::2], *of_base)


def _of_base(model: torch.nn.Module, batch: Batch, as_base: AsBase) -> tuple[torch.Tensor, torch.Tensor]:
    """The base's, as they are where nothing is trained: without dropout."""
    was_training = model.training
    memory_tracker.enter_phase("reference")
    model.eval()
    try:
        with torch.no_grad(), as_base():
            _, answers = _log_probabilities(model, batch)
    finally:
        model.train(was_training)
    memory_tracker.enter_phase("forward")
    return answers[::2], answers[1::2]


def _log_probabilities(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(D,) of all that is predicted of each document, and of its answer."""
    batch = dict(batch)
    layout, is_answer = batch.pop("layout"), batch.pop("is_answer")
    nats = _nats_of_each(model, batch)
    whole = -_sums(nats, layout.tokens)
    if layout.tokens == layout.answer_tokens:
        return whole, whole
    return whole, -_sums(nats * is_answer, layout.tokens)


def _nats_of_each(model: torch.nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """(N,); by trl's own head where ours does not allow tiles."""
    if fused_cross_entropy.suits(model):
        nats: torch.Tensor = model(**batch, fused_loss=True, of_each=True).nats
        return nats
    labelled = batch.pop("labelled")
    output = model(**batch, fused_lm_head=True, use_cache=False)
    return -output.log_probs[0].index_select(0, labelled)


def _sums(values: torch.Tensor, counts: tuple[int, ...]) -> torch.Tensor:
    """Of each document, by itself: always in one order, so equal to the bit wherever it stands."""
    return torch.stack([part.sum() for part in values.split(counts)])


def loss_of(pairs: Pairs, objective: Objective, beta: float, totals: torch.Tensor) -> torch.Tensor:
    """The share of these pairs in a loss over as many pairs, and tokens, as `totals` (2,) says."""
    assert objective.of_pairs is not None, "it learns from pairs"
    of_pairs, of_tokens = objective.of_pairs(pairs, beta)
    loss = of_pairs / totals[0]
    return loss if of_tokens is None else loss + of_tokens / totals[1]
