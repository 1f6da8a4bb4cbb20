"""AdamW with moments of 8 bits, as bitsandbytes has it: on the device, or in memory that may spill to the host."""

from qtune.train.optimizers import Optimizer

EIGHT_BIT_FROM, BLOCK = 4096, 256  # bitsandbytes' min_8bit_size, and elements to one scale
PAGED_FROM = 100_000  # elements, in bitsandbytes' Optimizer8bit.get_state_buffer
CODE_BOOKS = ("qmap1", "qmap2")


def state_bytes(elements: int) -> int:
    """Two moments of 8 bits each with a float32 scale a block, or of 32 bits for a small tensor."""
    from qtune.memory.memory_tracker import block_bytes

    if elements < EIGHT_BIT_FROM:
        return 2 * block_bytes(4 * elements)
    return 2 * (block_bytes(elements) + block_bytes(4 * -(-elements // BLOCK)))


def paged_bytes(elements: int) -> int:
    """Of that, what lies in paged memory: the moments of a tensor that is not small."""
    return 2 * elements if elements >= PAGED_FROM else 0


EIGHT_BIT = Optimizer("adamw_8bit", state_bytes, made_by="adamw_8bit", constant_state=CODE_BOOKS, order=10)
PAGED = Optimizer(
    "paged_adamw_8bit",
    state_bytes,
    made_by="paged_adamw_8bit",
    paged_bytes=paged_bytes,
    constant_state=CODE_BOOKS,
    order=20,
)
