"""EVA: A along the directions in which the inputs of its layer vary most, found on the user's own rows; B zero
(Paischer et al. 2024, arXiv:2410.07170).

Ranks stay as the recipe has them: that paper's redistribution among layers (rho > 1) is not done, so that what a plan
counts holds. What it costs and holds stands in `model.activation_directions`.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from qtune.model.lora_inits import Excluded, LoraInit, Pass

if TYPE_CHECKING:
    from peft import PeftModel


def by_rows(model: "PeftModel", packs: Iterable[Any], run: Pass) -> None:
    from qtune.model.activation_directions import point_along_inputs

    point_along_inputs(model, packs, run)


EVA = LoraInit(
    "eva",
    "A along the directions in which the layers' inputs vary most on your rows, found in up to 32 passes before the"
    " first step",
    by_rows=by_rows,
    excludes=(Excluded(("lora", "targets"), "experts", "an expert sees the rows that are sent to it alone"),),
    order=10,
)
