"""AdamW with moments of 8 bits, as bitsandbytes has it: on the device, or in memory that may spill to the host."""

from qtune.train.optimizers import Optimizer

EIGHT_BIT_FROM, BLOCK = 4096, 256  # bitsandbytes' min_8bit_size, and elements to one scale
PAGED_FROM = 100_000  # elements, in bitsandbytes' Optimizer8bit.get_state_buffer
CODE_BOOKS = ("qmap1", "qmap2")


def moment_bytes(elements: int, moments: int = 1) -> int:
    """Moments of 8 bits in one tensor, with a float32 scale a block, or of 32 bits where the weight is small."""
    from qtune.memory.memory_tracker import block_bytes

    if elements < EIGHT_BIT_FROM:
        return block_bytes(moments * 4 * elements)
    return block_bytes(moments * elements) + block_bytes(moments * 4 * -(-elements // BLOCK))


def state_bytes(elements: int) -> int:
    return 2 * moment_bytes(elements)


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
