"""AdamW that averages its weights in place of a schedule, in float32 (`train.schedule_free`)."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qtune.train.optimizers import Fault, Optimizer, Said

if TYPE_CHECKING:
    from torch.optim import Optimizer as TorchOptimizer

NAME = "schedule_free_adamw"


def made(steps: int) -> "tuple[type[TorchOptimizer], Mapping[str, Any]]":
    from qtune.train.schedule_free import ScheduleFreeAdamW

    return ScheduleFreeAdamW, {}


def state_bytes(elements: int) -> int:
    """z and v."""
    from qtune.memory.memory_tracker import block_bytes

    return 2 * block_bytes(4 * elements)


def workspace_bytes(weights: Sequence[int]) -> int:
    """The direction of one weight at a time."""
    return max(weights, default=0)


def refuses(said: Said) -> Iterator[Fault]:
    schedule = said("train.schedule")
    if schedule not in (None, "constant"):
        yield (
            ("train", "schedule"),
            f'train.optimizer = "{NAME}" averages its weights in place of a rate that falls. Leave train.schedule out.',
        )
    if said("lora.master_dtype") == "bfloat16":
        yield (
            ("lora", "master_dtype"),
            f'lora.master_dtype = "bfloat16" is too coarse for the average that train.optimizer = "{NAME}" makes: after'
            " some hundred steps it would not move any more. Leave it out.",
        )


SCHEDULE_FREE = Optimizer(
    NAME,
    state_bytes,
    made=made,
    schedule="constant",
    learning_rate=4e-4,  # twice AdamW's: the authors' README says 1 to 10 times that of one with a schedule
    workspace_bytes=workspace_bytes,
    refuses=refuses,
    averages=True,
    order=80,
)
