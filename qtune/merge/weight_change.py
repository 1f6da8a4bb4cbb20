"""How far merging moves a weight, beside what quantising it had cost."""

import math
from dataclasses import dataclass

import torch
from torch.linalg import vector_norm

from qtune import accelerator


@dataclass(frozen=True)
class LayerChange:
    """How far an adapted weight moved, beside what quantising it had cost: Frobenius norms over the original weight's.

    `quantization_error_fraction` is None for a weight that was not quantised.
    """

    module: str
    change_fraction: float
    quantization_error_fraction: float | None


@dataclass(frozen=True)
class Movement:
    """Sums of squares over some rows of an adapted weight; those of more rows are added."""

    size: float = 0.0
    change: float = 0.0
    error: float = 0.0

    @classmethod
    def between(
        cls, original: torch.Tensor, held: torch.Tensor | None, start: torch.Tensor, merged: torch.Tensor
    ) -> "Movement":
        """The same rows four times; `held` is them after 4 bits, None where they were not quantised."""
        original, start, merged = original.float(), start.float(), merged.float()
        held = original if held is None else held.float()
        if accelerator.is_card(original.device):
            return cls(*(float(vector_norm(each)) ** 2 for each in (original, merged - start, held - original)))
        from qtune.merge.kernels import squares  # a card does without numba

        sums = squares(*(each.flatten().numpy() for each in (original, held, start, merged)))
        return cls(*map(float, sums))

    def __add__(self, other: "Movement") -> "Movement":
        return Movement(self.size + other.size, self.change + other.change, self.error + other.error)

    def of(self, module: str, is_quantized: bool) -> LayerChange:
        change, error = (math.sqrt(part / self.size) if self.size else 0.0 for part in (self.change, self.error))
        return LayerChange(module, change, error if is_quantized else None)
