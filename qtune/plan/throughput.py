"""How long a run takes, estimated from its arithmetic: good for comparing plans, rough as a clock.

Frozen weights have no gradient, so a token costs 2P operations forward and 2P backward, and 2P more where layers are
recomputed (P the parameters it passes through); attention adds 4TE a head and layer forward, halved as it is causal,
and 2.5 times that backward.

Of a card the rate is a maker's figure. The processor is tried: products of matrices, products with an adapter's few
columns, attention and plain operations on memory each run at a rate of their own there, and of each the work is
counted. Its optimizer's step and Python are not in the sum, a twentieth of a step of a small model.

Letters: P parameters, R trained ones, T tokens of a document, E head_dim.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.nn.functional import scaled_dot_product_attention

from qtune.hardware import Device
from qtune.memory.techniques.standing import ATTENTION_PASSES, Standing
from qtune.plan.ladder import Ladder
from qtune.plan.workload import Work
from qtune.plan.world import ALONE, World
from qtune.train.objectives import OBJECTIVES

OF_REFERENCE = 1 / 2  # of a step's arithmetic: what the frozen weights take forward, of forward and backward
GRADIENT_BYTES = 4  # of a trained weight: ranks add up float32
LOGIT_BYTES = 44  # read and written of one logit, counted in fused_cross_entropy.of_weight: float32 in place
TRIED_ROWS, TRIED_HEADS, TRIED_HEAD_DIM = (
    2048,
    4,
    64,
)  # a pack of the usual length; most models' head_dim, or half of it
KEPT = 32  # results that are there at once, as the activations of a pass are: new memory is slower than a cache
LONGEST_TRIED = 1024  # tokens of a document: longer ones take too long to try
TRIES = 3


@dataclass(frozen=True)
class Speed:
    """Estimated seconds; None where the device's arithmetic is not known, as for one that is only imagined."""

    tokens_per_second: float | None
    step_seconds: float | None
    total_seconds: float | None
    overhead_fraction: float
    pack_seconds: float | None = None  # of one sequence


@dataclass(frozen=True)
class Rates:
    """What the processor does in a second: operations in products with an adapter's matrices and in attention, and
    bytes read and written."""

    adapter_operations: float
    attention_operations: float
    moved_bytes: float


def estimate(
    ladder: Ladder, overhead: float, device: Device, compute_dtype: str, steps: int, world: World = ALONE
) -> Speed:
    """`overhead`, of one, is what the techniques add to a step that had memory to spare. Of several ranks all have such
    a device, and none ends its step before the one with most packs."""
    train, work = ladder.recipe.train, ladder.work
    packs = train.micro_batch * train.gradient_accumulation
    if device.operations_per_second is None:
        return Speed(None, None, None, overhead)
    if device.is_card:
        plain = _operations(ladder.standing, work) / device.operations_per_second
    else:
        plain = _processor_seconds(ladder, device.operations_per_second, compute_dtype)
    if OBJECTIVES[train.objective].has_reference:
        plain *= 1 + OF_REFERENCE
    pack_seconds = plain * (1 + overhead) / len(work.sequences)
    step = world.share(packs) * pack_seconds + world.sum_seconds(GRADIENT_BYTES * ladder.standing.trained_parameters)
    return Speed(packs * work.mean_tokens / step, step, steps * step, overhead, pack_seconds)


def pass_seconds(standing: Standing, work: Work, micro_batch: int, device: Device) -> float:
    """Of a card's arithmetic for a batch, forward and backward, with memory to spare; 0 where that is not known."""
    if not device.is_card or device.operations_per_second is None:
        return 0.0
    batches = len(work.sequences) / micro_batch
    return _operations(standing, work) / device.operations_per_second / batches


def _operations(standing: Standing, work: Work) -> float:
    """Of one forward and one backward pass over all documents."""
    of_weights = standing.frozen_operations + standing.trained_operations
    return of_weights * work.tokens + standing.attention_operations * work.squared_tokens


def _processor_seconds(ladder: Ladder, products: float, compute_dtype: str) -> float:
    """Of all documents once, `products` being the operations a second of large products."""
    standing, work, batch = ladder.standing, ladder.work, ladder.work.heaviest(1)
    tokens = work.tokens
    typical = work.squared_tokens // tokens  # attention's work is that of such documents
    rates = _rates(
        compute_dtype, standing.attention_width, ladder.recipe.lora.rank, min(LONGEST_TRIED, max(16, typical))
    )
    vocabulary = standing.head_parameters / standing.attention_width  # which is about as wide as the model
    of_layers = ladder.forecaster.passes.moved_bytes(ladder.foot, batch) / batch.tokens
    of_logits = LOGIT_BYTES * vocabulary * batch.labelled / batch.tokens
    return (
        standing.frozen_operations * tokens / products
        + standing.trained_operations * tokens / rates.adapter_operations
        + standing.attention_operations * work.squared_tokens / rates.attention_operations
        + (of_layers + of_logits) * tokens / rates.moved_bytes
    )


@lru_cache(maxsize=8)
def _rates(compute_dtype: str, width: int, rank: int, length: int) -> Rates:
    """Tried now, of documents of so many tokens, in a tenth of a second."""
    dtype = getattr(torch, compute_dtype)
    hidden, adapter = torch.ones(TRIED_ROWS, width, dtype=dtype), torch.ones(width, rank, dtype=dtype)
    heads = torch.ones(3, 1, TRIED_HEADS, length, TRIED_HEAD_DIM, dtype=dtype)
    query, key, value = (each.requires_grad_() for each in heads.unbind())

    def adapt() -> None:
        inner = hidden @ adapter
        inner.float().t() @ hidden.float()  # as an adapter's gradient is summed

    def move() -> None:
        [hidden * hidden for _ in range(KEPT)]

    def attend() -> None:
        scaled_dot_product_attention(query, key, value, is_causal=True).sum().backward()

    return Rates(
        2 * 2 * hidden.numel() * rank / _seconds(adapt),
        ATTENTION_PASSES * 2 * TRIED_HEADS * TRIED_HEAD_DIM * length * length / _seconds(attend),
        KEPT * 3 * hidden.nbytes / _seconds(move),
    )


def _seconds(act: Callable[[], object]) -> float:
    """The mean of a few tries, the first not counted."""
    act()
    start = time.perf_counter()
    for _ in range(TRIES):
        act()
    return (time.perf_counter() - start) / TRIES
