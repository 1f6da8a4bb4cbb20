"""The optimizers, a file each: who adds a file with an `Optimizer` in it has added one. Nothing heavy is loaded here.

The recipe asks for names, the plan for bytes, the trainer for the class, a checkpoint for what it need not hold.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qtune.registry import registered

if TYPE_CHECKING:
    from torch.optim import Optimizer as TorchOptimizer


def _nothing_paged(elements: int) -> int:
    return 0


@dataclass(frozen=True)
class Optimizer:
    """`name` is what train.optimizer calls it.

    `state_bytes` is what it keeps of one trained tensor of so many elements. `workspace_fraction` is what its step on a
    card takes beside, of the trained weights' bytes. `paged_bytes` is how much of that state lies in memory which the
    driver moves between card and host. `constant_state` are keys of its state that are the same for all weights, and
    made again rather than saved.

    `made_by` is transformers' name for it (`TrainingArguments.optim`); one that it does not know is `made`: a class and
    its settings, but for the rate and what the trainer says of each group of weights (`params`, `weight_decay`).
    """

    name: str
    state_bytes: Callable[[int], int]
    made_by: str = "adamw_torch"
    made: "Callable[[], tuple[type[TorchOptimizer], Mapping[str, Any]]] | None" = None
    workspace_fraction: float = 0.0
    paged_bytes: Callable[[int], int] = _nothing_paged
    constant_state: tuple[str, ...] = ()
    order: float = 100  # in the list of them; one of which nothing is said comes last

    def made_with(self, rate: float) -> "tuple[type[TorchOptimizer], dict[str, Any]] | None":
        """What the trainer makes it of; None where transformers knows it itself."""
        if self.made is None:
            return None
        kind, settings = self.made()
        return kind, {"lr": rate, **settings}


OPTIMIZERS = registered(__name__, Optimizer)


def leanest() -> Optimizer:
    """The one that keeps least on the device."""
    many = 1 << 20
    return min(OPTIMIZERS.values(), key=lambda each: (each.state_bytes(many) - each.paged_bytes(many), each.order))
