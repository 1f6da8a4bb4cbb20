"""Muon, as torch has had it since 2.9: each step is the nearest matrix with orthogonal rows or columns to the momentum.

Five steps of Newton and Schulz make that of A's and of B's momentum, each by itself
(kellerjordan.github.io/posts/muon). It is scaled by 0.2 sqrt(the longer side), which gives its elements the size of
AdamW's steps (arXiv:2502.16982), so that AdamW's rates hold.

Held less of: half of AdamW's state, 4 bytes a trained weight.
Costs: 15 products of matrices a step for each A and each B, in bfloat16: not measured on a card.
Refuses: what is no matrix of one layer: DoRA's lengths, rows of tokens, and the adapters of experts, which lie in one
matrix.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qtune.train.optimizers import Fault, Optimizer, Said

if TYPE_CHECKING:
    from torch.optim import Optimizer as TorchOptimizer


def made(steps: int) -> "tuple[type[TorchOptimizer], Mapping[str, Any]]":
    from torch.optim import Muon

    return Muon, {"adjust_lr_fn": "match_rms_adamw"}


def state_bytes(elements: int) -> int:
    from qtune.memory.memory_tracker import block_bytes

    return block_bytes(4 * elements)


def workspace_bytes(weights: Sequence[int]) -> int:
    """Of one weight at a time: the direction in float32, and two of bfloat16 from one product to the next."""
    return 2 * max(weights, default=0)


def refuses(said: Said) -> Iterator[Fault]:
    beside = {"lora.dora": "lengths", "lora.train_tokens": "rows of a table"}
    for setting, what in beside.items():
        if said(setting):
            yield (
                ("train", "optimizer"),
                f'train.optimizer = "muon" moves matrices, and {setting} trains {what} beside. Leave one of them out.',
            )
    targets = said("lora.targets")
    if isinstance(targets, list | tuple) and "experts" in targets:
        yield (
            ("train", "optimizer"),
            'train.optimizer = "muon" would take the adapters of all experts of a layer for one matrix, and'
            ' lora.targets names "experts". Leave one of them out.',
        )


MUON = Optimizer(
    "muon",
    state_bytes,
    made=made,
    workspace_bytes=workspace_bytes,
    rounds_by_card=True,
    refuses=refuses,
    order=70,
)
