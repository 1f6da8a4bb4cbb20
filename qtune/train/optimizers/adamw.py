"""AdamW in float32, as torch has it."""

from qtune.train.optimizers import Optimizer


def state_bytes(elements: int) -> int:
    """Two moments, and the number of steps as a tensor."""
    from qtune.memory.memory_tracker import block_bytes

    return 2 * block_bytes(4 * elements) + block_bytes(4)


ADAMW = Optimizer(
    "adamw",
    state_bytes,
    made_by="adamw_torch",
    workspace_bytes=sum,  # its foreach step makes a list of denominators as large as the weights; the CPU's does not
    order=30,
)
