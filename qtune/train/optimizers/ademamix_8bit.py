"""AdEMAMix with moments of 8 bits, as bitsandbytes has it: AdamW that remembers old gradients, too (arXiv:2409.03137).

A second mean of gradients, which forgets far slower (b3 0.9999), is added to the first alpha = 5 times. Over the run
alpha rises evenly from 0, and b3 from b1 so that what it remembers grows evenly, as in the paper. A run that goes on
with more steps remembers as if it had always had as many.

Held less of: nothing; its third moment makes it half as large again as 8-bit AdamW, 3 bytes a trained weight.
Costs: steps that grow where gradients agree: at the end of a run of 100 steps to 1.25 of AdamW's, of 1,000 to 3.4.
Refuses: nothing.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qtune.train.optimizers import Optimizer
from qtune.train.optimizers.adamw_8bit import CODE_BOOKS, moment_bytes

if TYPE_CHECKING:
    from torch.optim import Optimizer as TorchOptimizer


def made(steps: int) -> "tuple[type[TorchOptimizer], Mapping[str, Any]]":
    from bitsandbytes.optim import AdEMAMix

    return AdEMAMix, {"optim_bits": 8, "t_alpha": steps, "t_beta3": steps}


def state_bytes(elements: int) -> int:
    """Both means are in one tensor."""
    return moment_bytes(elements, 2) + moment_bytes(elements)


ADEMAMIX = Optimizer("ademamix_8bit", state_bytes, made=made, constant_state=CODE_BOOKS, order=60)
