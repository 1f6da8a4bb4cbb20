"""The optimizers, a file each: who adds a file with an `Optimizer` in it has added one. Nothing heavy is loaded here.

The recipe asks for names, the plan for bytes, the trainer for the class, a checkpoint for what it need not hold.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qtune.registry import registered

if TYPE_CHECKING:
    from torch.optim import Optimizer as TorchOptimizer


Said = Callable[[str], Any]  # what a recipe says, as written, of a setting such as "lora.dora"; None where it does not
Fault = tuple[tuple[str, ...], str]  # of a recipe: the setting, and a sentence
ADAMW_RATE = 2e-4  # QLoRA's own (arXiv:2305.14314)


def _nothing_paged(elements: int) -> int:
    return 0


def _no_workspace(weights: Sequence[int]) -> int:
    return 0


def _refuses_nothing(said: Said) -> Iterator[Fault]:
    yield from ()


@dataclass(frozen=True)
class Optimizer:
    """`name` is what train.optimizer calls it.

    `state_bytes` is what it keeps of one trained tensor of so many elements. `workspace_bytes` is what its step on a
    card takes beside, by the bytes of each trained weight. `paged_bytes` is how much of that state lies in memory which
    the driver moves between card and host. `constant_state` are keys of its state that are the same for all weights,
    and made again rather than saved. `learning_rate` and `schedule` are what a recipe has that names none.

    `made_by` is transformers' name for it (`TrainingArguments.optim`); one that it does not know is `made`, for a run
    of so many steps: a class and its settings, but for the rate and what the trainer says of each group of weights
    (`params`, `weight_decay`). The class of one that `averages` has `eval` and `train`: what is scored and saved are
    the weights as they are after the one, and what is trained those after the other, which are kept beside meanwhile.

    `refuses` are the faults of a recipe that asks for it beside what it cannot do. One that `rounds_by_card` does not
    take the same step to the bit on cards of different kinds.
    """

    name: str
    state_bytes: Callable[[int], int]
    made_by: str = "adamw_torch"
    made: "Callable[[int], tuple[type[TorchOptimizer], Mapping[str, Any]]] | None" = None
    learning_rate: float = ADAMW_RATE
    schedule: str = "cosine"
    workspace_bytes: Callable[[Sequence[int]], int] = _no_workspace
    paged_bytes: Callable[[int], int] = _nothing_paged
    constant_state: tuple[str, ...] = ()
    refuses: Callable[[Said], Iterator[Fault]] = _refuses_nothing
    averages: bool = False
    rounds_by_card: bool = False
    order: float = 100  # in the list of them; one of which nothing is said comes last

    def made_with(self, rate: float, steps: int) -> "tuple[type[TorchOptimizer], dict[str, Any]] | None":
        """What the trainer makes it of; None where transformers knows it itself."""
        if self.made is None:
            return None
        kind, settings = self.made(steps)
        return kind, {"lr": rate, **settings}


OPTIMIZERS = registered(__name__, Optimizer)


def leanest() -> Optimizer:
    """The one that keeps least on the device."""
    many = 1 << 20
    return min(OPTIMIZERS.values(), key=lambda each: (each.state_bytes(many) - each.paged_bytes(many), each.order))
