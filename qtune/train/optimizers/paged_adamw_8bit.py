"""AdamW with moments of 8 bits in memory that may spill to the host, as bitsandbytes has it."""

from qtune.train.optimizers import Optimizer
from qtune.train.optimizers.adamw_8bit import CODE_BOOKS, state_bytes

PAGED = Optimizer(
    "paged_adamw_8bit",
    state_bytes,
    made_by="paged_adamw_8bit",
    is_paged=True,
    constant_state=CODE_BOOKS,
    order=10,
)
