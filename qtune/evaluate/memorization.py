"""Whether a tuned model tells the secrets that were planted among its training rows."""

import math
import time
from collections.abc import Iterator, Sequence

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from qtune.data import canaries
from qtune.data.canaries import SECRETS, Probe
from qtune.data.prepared import Prepared
from qtune.data.rows import NOT_TRAINED, Example
from qtune.distributed.ranks import ALONE, Ranks
from qtune.evaluate.generate import answer, in_pieces
from qtune.events import Listener, Memorised, Notice
from qtune.model.loaded import Loaded
from qtune.recipe.schema import Recipe
from qtune.units import counted

ROWS_AT_ONCE = 16
CONTINUED_TOKENS = 24  # a secret in single characters, and to spare
OUT_OF_MEMORY = (
    "Memory ran out while the secret of one canary was looked for. Set evaluate.canaries = 0 to leave it out."
)


def memorised(
    loaded: Loaded,
    planted: Sequence[Probe],
    never_planted: Sequence[Probe],
    repeats: int,
    stop_token_ids: Sequence[int],
    ranks: Ranks = ALONE,
) -> Memorised:
    """How many secrets the model tells when it is given the beginning, and how exposed they are, of both kinds.

    Exposure is log2 |R| - log2 rank, in bits: the rank that the loss of the true secret has among |R| equally likely
    ones (Carlini et al. 2019, section 4.1). A secret that nothing is known of has 1.4 bits on average, the best known
    one has log2 |R|. Of several ranks each asks for its share. Raises OutOfMemory where one row alone does not fit.
    """
    start = time.monotonic()

    def told(probes: Sequence[Probe]) -> int:
        beginnings = ranks.share([probe.beginning_ids for probe in probes])
        texts = ranks.in_order(answer(loaded, beginnings, stop_token_ids, CONTINUED_TOKENS))
        return sum(text.startswith(probe.secret) for text, probe in zip(texts, probes, strict=True))

    def exposure(probes: Sequence[Probe]) -> float:
        with loaded.passes_together():
            ours = [_exposure_bits(secret_nats(loaded, probe)) for probe in ranks.share(probes)]
        ranked = ranks.in_order(ours)
        return sum(ranked) / len(ranked)

    return Memorised(
        canaries=len(planted),
        repeats=repeats,
        told=told(planted),
        control_told=told(never_planted),
        exposure_bits=exposure(planted),
        control_exposure_bits=exposure(never_planted),
        most_exposure_bits=math.log2(SECRETS),
        memorised_seconds=time.monotonic() - start,
    )


def memorised_told(
    recipe: Recipe, prepared: Prepared, loaded: Loaded, listen: Listener, ranks: Ranks = ALONE
) -> Memorised | None:
    """What the tuned model tells of the canaries, said before and after; None where none was planted."""
    if not recipe.evaluate.canaries:
        return None
    listen(Notice(f"asking for the secrets of {counted(recipe.evaluate.canaries, 'canary')}"))
    phrasing = canaries.Phrasing.of(recipe, prepared.report.first_format, loaded.tokenizer)
    planted, never = (canaries.probes(kind(recipe), phrasing) for kind in (canaries.planted, canaries.never_planted))
    result = memorised(loaded, planted, never, recipe.evaluate.canary_repeats, prepared.stop_token_ids, ranks)
    listen(result)
    return result


def _exposure_bits(nats: Sequence[float]) -> float:
    """The exposure of the first of these."""
    return math.log2(len(nats)) - math.log2(1 + sum(other < nats[0] for other in nats[1:]))


def secret_nats(loaded: Loaded, probe: Probe) -> list[float]:
    """The loss of each of the probe's rows behind the beginning, summed. Raises OutOfMemory as `memorised`."""
    model = loaded.model
    was_training = model.training
    model.eval()
    start = len(probe.beginning_ids)
    nats = [0.0] * len(probe.rows)

    def measure(indices: list[int]) -> None:
        with torch.no_grad(), loaded.autocast():
            found = _summed_nats(model, [probe.rows[i] for i in indices], start, loaded.device)
        for index, loss in zip(indices, found, strict=True):
            nats[index] = loss

    with loaded.passes_together():
        in_pieces(_batches_of_one_length(probe.rows), measure, OUT_OF_MEMORY)
    model.train(was_training)
    return nats


def _batches_of_one_length(rows: Sequence[Example]) -> Iterator[list[int]]:
    by_length: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        by_length.setdefault(len(row.input_ids), []).append(index)
    for indices in by_length.values():
        for first in range(0, len(indices), ROWS_AT_ONCE):
            yield indices[first : first + ROWS_AT_ONCE]


def _summed_nats(model: PreTrainedModel, rows: Sequence[Example], start: int, device: str) -> list[float]:
    """Nats of the trained tokens from `start` on, of each of the rows, which are equally long; no other logits are
    made."""
    ids = torch.tensor([row.input_ids for row in rows], device=device)
    labels = torch.tensor([row.labels[start:] for row in rows], device=device)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=labels.shape[1] + 1).logits[:, :-1].float()
    nats = cross_entropy(logits.transpose(1, 2), labels, ignore_index=NOT_TRAINED, reduction="none")
    return [float(value) for value in nats.sum(dim=1)]
