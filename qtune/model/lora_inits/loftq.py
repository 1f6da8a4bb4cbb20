"""LoftQ in one iteration: B A begins as the best of its rank for what rounding to 4 bits took from a weight
(Li et al. 2023, arXiv:2310.08659, algorithm 1 with T = 1).

Further iterations would round W - s B A in place of W, which is another base than everybody has in 4 bits.
"""

from typing import TYPE_CHECKING

from qtune.model.lora_inits import Excluded, LoraInit, Rounded

if TYPE_CHECKING:
    from peft import PeftModel


def by_weights(model: "PeftModel", weights: Rounded) -> None:
    from qtune.model.quantization_error import make_good

    make_good(model, weights)


LOFTQ = LoraInit(
    "loftq",
    "A and B begin as what of their rank makes good most of what rounding to 4 bits took",
    by_weights=by_weights,
    excludes=(
        Excluded(
            ("model", "quantization"), "none", "it makes good what rounding to 4 bits took, and nothing is rounded"
        ),
        Excluded(("lora", "dora"), True, "DoRA's lengths would be those of weights without it"),
        Excluded(("lora", "targets"), "experts", "experts are rounded together, and their A and B begin together"),
    ),
    changes_answers=True,
    not_onto_original="its adapter holds part of what rounding to 4 bits took from the weights, and the original ones"
    " have that already",
    order=20,
)
