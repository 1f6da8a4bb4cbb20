"""One weight with its part of the adapter folded in: as jobs for a few rows each, which may be done side by side."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from qtune.errors import ModelError
from qtune.merge.lora_delta import Delta
from qtune.merge.nf4_round_trip import Index, Rows, rows_at_once
from qtune.merge.weight_change import Movement


@dataclass(frozen=True)
class Part:
    """Some rows of the tensor `name` in host memory, in the dtype they are written in, and how far they moved."""

    name: str
    rows: torch.Tensor
    movement: Movement | None = None


Job = Callable[[], Part]


@dataclass(frozen=True)
class Weight:
    """The tensor `name` as a matrix (O, I), and what makes it the one that is written, in `dtype`.

    `start` are its rows as `change` is added to them, None for those of `original`. `held` are they after 4 bits, for
    the movement of an adapted weight, where that is wanted; None where it was not quantised.
    """

    name: str
    original: torch.Tensor
    dtype: torch.dtype
    start: Rows | None = None
    change: Delta | None = None
    held: Rows | None = None
    is_measured: bool = False

    def jobs(self, order: torch.Tensor | None = None) -> Iterator[Job]:
        """A job for every few rows, as they follow each other; `order` (O,) says which row of this weight is where."""
        at_once = rows_at_once(self.original)
        for start in range(0, len(self.original), at_once):
            rows = slice(start, start + at_once)
            yield partial(self.part, rows if order is None else order[rows])

    def part(self, rows: Index) -> Part:
        """`rows` with the adapter folded in, in float32 and rounded once. Raises ModelError where that overflows."""
        start = self.original[rows] if self.start is None else self.start(rows)
        if self.change is None:
            merged, moved = start, None
        else:
            start = start.float()
            merged = self.change.apply(start, rows)
            moved = self._movement(rows, start, merged) if self.is_measured else None
        written = merged.to(self.dtype)
        self._refuse_not_finite(written, rows)
        return Part(self.name, written.cpu(), moved)

    def _movement(self, rows: Index, start: torch.Tensor, merged: torch.Tensor) -> Movement:
        original = start if self.start is None else self.original[rows]
        held = None if self.held is None else start if self.held is self.start else self.held(rows)
        return Movement.between(original, held, start, merged)

    def _refuse_not_finite(self, written: torch.Tensor, rows: Index) -> None:
        if all_finite(written):
            return
        if not all_finite(self.original[rows]):
            raise ModelError(f"{self.name}: holds NaN or infinity in the base already. Download the base again.")
        hint = " Use --dtype bfloat16, which reaches further." if written.dtype == torch.float16 else ""
        raise ModelError(f"{self.name}: is not finite in {written.dtype} once merged.{hint}")


def all_finite(tensor: torch.Tensor) -> bool:
    """The sum of what is finite may overflow, of anything else it is never finite: it is asked first, being faster."""
    return bool(torch.isfinite(tensor.sum()) or torch.isfinite(tensor).all())
