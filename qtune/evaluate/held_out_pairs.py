"""What a model makes of held-out pairs, and the loss that follows where the base's log-probabilities are known.

A pair counts as preferred where its chosen answer has the greater log-probability a token. That asks nothing of the
base, so that base, tuned and merged models are measured alike, and long answers are no less likely for their length.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from qtune.data.packing import PackedRow
from qtune.distributed.ranks import ALONE, Ranks
from qtune.evaluate.held_out_loss import held_out_loss, of_packs
from qtune.memory import pair_loss
from qtune.memory.oom_recovery import Batch, Recovery
from qtune.model.loaded import Loaded
from qtune.recipe.schema import Train
from qtune.train.objectives import OBJECTIVES, Pairs


class PairLogs(NamedTuple):
    """Log-probabilities of the answers of a pair, and over how many tokens; of the chosen row as a whole, too."""

    chosen: float
    rejected: float
    chosen_tokens: float
    rejected_tokens: float
    whole: float
    whole_tokens: float

    @property
    def margin(self) -> float:
        """How much more log-probability a token the chosen answer has, in nats."""
        return self.chosen / self.chosen_tokens - self.rejected / self.rejected_tokens

    @property
    def is_preferred(self) -> float:
        """1 or 0; a half where neither answer is."""
        return 0.5 if self.margin == 0 else float(self.margin > 0)


def loss_and_pairs(
    loaded: Loaded,
    packs: Sequence[PackedRow],
    learned: Train,
    recovery: Recovery | None = None,
    ranks: Ranks = ALONE,
    base: Sequence[PairLogs] = (),
) -> tuple[float, tuple[PairLogs, ...]]:
    """The held-out loss of what is `learned`, and of pairs what it was made of; against that of the `base`, or of the
    model itself where it is the base. Raises OutOfMemory as `held_out_loss`."""
    if not learned.learns_pairs:
        return held_out_loss(loaded, packs, recovery, ranks), ()
    every = _logs_of(loaded, packs, learned, recovery, ranks)
    return loss_of(every, base or every, learned), every


def _logs_of(
    loaded: Loaded, packs: Sequence[PackedRow], learned: Train, recovery: Recovery | None, ranks: Ranks
) -> tuple[PairLogs, ...]:
    objective = OBJECTIVES[learned.objective]

    def of_piece(model: Any, batch: Batch) -> list[PairLogs]:
        pairs = pair_loss.pairs_of(model, batch, objective)
        assert pairs.whole is not None, "every pass has it"
        whole_tokens = pairs.whole.new_tensor(batch["layout"].tokens[::2])
        columns = (pairs.chosen, pairs.rejected, pairs.chosen_tokens, pairs.rejected_tokens, pairs.whole, whole_tokens)
        return [PairLogs(*row) for row in torch.stack(columns, dim=1).tolist()]

    recovery = recovery or Recovery(together=objective.documents)
    prepared = of_packs(loaded, packs, of_piece, recovery, ranks, lambda batch: pair_loss.laid_out(batch, objective))
    return tuple(PairLogs(*pair) for pieces in prepared for piece in pieces for pair in piece)


def loss_of(every: Sequence[PairLogs], base: Sequence[PairLogs], learned: Train) -> float:
    """The mean loss over all pairs, in float64."""
    chosen, rejected, tokens, other_tokens, whole, whole_tokens = torch.tensor(every, dtype=torch.double).unbind(1)
    base_chosen, base_rejected, *_ = torch.tensor(base, dtype=torch.double).unbind(1)
    pairs = Pairs(chosen, rejected, tokens, other_tokens, whole, base_chosen, base_rejected)
    totals = torch.stack([torch.ones_like(whole).sum(), whole_tokens.sum()])
    return float(pair_loss.loss_of(pairs, OBJECTIVES[learned.objective], learned.beta, totals))
