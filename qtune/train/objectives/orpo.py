"""Odds ratio preference optimisation (Hong, Lee and Thorne 2024, arXiv:2403.07691, equations 5 to 7).

The cross-entropy of the chosen answers, and -beta log sigmoid(log odds of the chosen over the rejected answer), where
the probability of an answer is the geometric mean over its tokens. As in the authors' code and in trl, the
cross-entropy is over the question, too, and a mean over the tokens of a step.

Held less of: a second model; there is no reference.
Costs: the loss is made of all tokens of the chosen row, question included.
"""

from typing import TYPE_CHECKING

from qtune.train.objectives import Objective, Pairs

if TYPE_CHECKING:
    import torch

SUREST = -1e-6  # a mean log-probability: float32 does not tell 1 - exp(x) from nought far above it


def of_pairs(pairs: Pairs, beta: float) -> "tuple[torch.Tensor, torch.Tensor]":
    from torch.nn.functional import logsigmoid

    assert pairs.whole is not None, "it reads the whole row"
    chosen = (pairs.chosen / pairs.chosen_tokens).clamp(max=SUREST)
    rejected = (pairs.rejected / pairs.rejected_tokens).clamp(max=SUREST)
    odds = (chosen - rejected) - (_log_of_rest(chosen) - _log_of_rest(rejected))
    return -beta * logsigmoid(odds).sum(), -pairs.whole.sum()


def _log_of_rest(logs: "torch.Tensor") -> "torch.Tensor":
    """log(1 - exp(x)) of x < 0."""
    return (-logs.expm1()).log()


ORPO = Objective(
    "orpo",
    "learns chosen answers, and to prefer them to rejected ones, without the base beside it",
    of_pairs,
    reads_whole=True,
    order=30,
)
