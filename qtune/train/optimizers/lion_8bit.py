"""Lion with its moment in 8 bits, as bitsandbytes has it: every weight moves by the rate, up or down.

arXiv:2302.06675: w <- w - lr (sign(b1 m + (1 - b1) g) + decay w), then m <- b2 m + (1 - b2) g, with b1 0.9 and b2 0.99.

Held less of: half of what 8-bit AdamW keeps, 1 byte a trained weight.
Costs: nothing; it wants a rate 3 to 10 times lower than AdamW, and that much more decay.
Refuses: nothing.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qtune.train.optimizers import Optimizer
from qtune.train.optimizers.adamw_8bit import CODE_BOOKS, moment_bytes

if TYPE_CHECKING:
    from torch.optim import Optimizer as TorchOptimizer


def made(steps: int) -> "tuple[type[TorchOptimizer], Mapping[str, Any]]":
    from bitsandbytes.optim import Lion

    return Lion, {"betas": (0.9, 0.99), "optim_bits": 8}  # the paper's


LION = Optimizer(
    "lion_8bit",
    moment_bytes,
    made=made,
    learning_rate=5e-5,  # a quarter of AdamW's: section 5 of the paper says 3 to 10 times lower
    constant_state=CODE_BOOKS,
    order=50,
)
