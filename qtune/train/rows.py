"""What is trained on, and what is held out of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qtune.data.packing import PackedRow
from qtune.train.sampler import DataOrder


@dataclass(frozen=True)
class HeldOutLoss:
    """The held-out loss of the model as it stands: over all `rows`, with that of each of several sources by name, and
    over the largest sequence of them alone."""

    rows: int
    of_all: Callable[[], tuple[float, dict[str, float]]]
    of_largest: Callable[[], float]


def no_places(packs: Sequence[int]) -> list[str]:
    return []


@dataclass(frozen=True)
class TrainingRows:
    """Sequences to train on; `places` names the rows of the data that those of these numbers were made of.

    `answers` are the prompts that are watched, each with what the model as it stands answers to it.
    """

    packs: Sequence[PackedRow]
    held_out: HeldOutLoss | None = None
    answers: Callable[[], Sequence[tuple[str, str]]] | None = None
    places: Callable[[Sequence[int]], list[str]] = no_places

    @property
    def held_out_rows(self) -> int:
        return self.held_out.rows if self.held_out else 0

    def order(self, seed: int) -> DataOrder:
        """In which they are trained on."""
        return DataOrder(len(self.packs), seed)
