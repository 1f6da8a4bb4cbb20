"""Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290, equation 7).

-log sigmoid(beta ((c - c0) - (r - r0))), a mean over pairs: c and r are the log-probabilities of the chosen and the
rejected answer, summed over their tokens, c0 and r0 those of the base.

Held less of: a second model. The reference is the same base with the adapter off.
Costs: a pass forward without gradient before each that trains, which holds less than that one.
"""

from typing import TYPE_CHECKING

from qtune.train.objectives import Objective, Pairs

if TYPE_CHECKING:
    import torch


def of_pairs(pairs: Pairs, beta: float) -> "tuple[torch.Tensor, None]":
    from torch.nn.functional import logsigmoid

    assert pairs.base_chosen is not None
    assert pairs.base_rejected is not None
    chosen, rejected = pairs.chosen - pairs.base_chosen, pairs.rejected - pairs.base_rejected
    return -logsigmoid(beta * (chosen - rejected)).sum(), None


DPO = Objective(
    "dpo",
    "learns to prefer chosen answers to rejected ones, measured against the base",
    of_pairs,
    has_reference=True,
    order=20,
)
