"""What is learned from rows, a file each: who adds a file with an `Objective` in it has added one. Nothing heavy is
loaded here.

Letters: P pairs of a chosen and a rejected answer to the same question.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qtune.registry import registered

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Pairs:
    """What a pass says of P pairs, (P,) each.

    `chosen` and `rejected` are log-probabilities of the answers, summed over `chosen_tokens` and `rejected_tokens`, and
    `base_chosen` and `base_rejected` those of the base. `whole` is that of the chosen answer and of what stands before
    it: all tokens of the row but the first. What an objective does not ask for may be None.
    """

    chosen: "torch.Tensor"
    rejected: "torch.Tensor"
    chosen_tokens: "torch.Tensor"
    rejected_tokens: "torch.Tensor"
    whole: "torch.Tensor | None" = None
    base_chosen: "torch.Tensor | None" = None
    base_rejected: "torch.Tensor | None" = None


@dataclass(frozen=True)
class Objective:
    """`name` is what train.objective calls it.

    One that learns from pairs has `of_pairs`: of pairs and train.beta two sums, one that the loss is a mean over pairs
    of, and one that it is a mean over the tokens of `Pairs.whole` of. It `has_reference` where it reads `base_*`, and
    `reads_whole` where it reads `whole`. Without `of_pairs` every row is learned by itself.
    """

    name: str
    description: str
    of_pairs: "Callable[[Pairs, float], tuple[torch.Tensor, torch.Tensor | None]] | None" = None
    has_reference: bool = False
    reads_whole: bool = False
    order: int = 100

    @property
    def learns_pairs(self) -> bool:
        return self.of_pairs is not None

    @property
    def documents(self) -> int:
        """How many of them belong together, so that one pass has to see them all."""
        return 2 if self.learns_pairs else 1


OBJECTIVES = registered(__name__, Objective)
