"""A made-up optimizer, which transformers spells otherwise: descent with momentum."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qtune.train.optimizers import Optimizer

if TYPE_CHECKING:
    from torch.optim import Optimizer as TorchOptimizer


def made(steps: int) -> "tuple[type[TorchOptimizer], Mapping[str, Any]]":
    from torch.optim import SGD

    return SGD, {"momentum": 0.9}


def state_bytes(elements: int) -> int:
    from qtune.memory.memory_tracker import block_bytes

    return block_bytes(4 * elements)


MOMENTUM = Optimizer("momentum", state_bytes, made=made)
