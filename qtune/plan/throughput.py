"""How long a run takes, estimated from its arithmetic: good for comparing plans, rough as a clock.

Frozen weights have no gradient, so a token costs 2P operations forward and 2P backward, and 2P more where layers are
recomputed (P the parameters it passes through); attention adds 4TE a head and layer forward, halved as it is causal,
and 2.5 times that backward.

Letters: P parameters, T tokens of a document, E head_dim.
"""

from dataclasses import dataclass

from qtune.hardware import Device
from qtune.memory.techniques.standing import Standing
from qtune.plan.ladder import Ladder


@dataclass(frozen=True)
class Speed:
    """Estimated seconds; None where the device's arithmetic is not known, as for one that is only imagined."""

    tokens_per_second: float | None
    step_seconds: float | None
    total_seconds: float | None
    overhead_fraction: float


def estimate(ladder: Ladder, overhead: float, device: Device, steps: int) -> Speed:
    """`overhead`, of one, is what the techniques add to a step that had memory to spare."""
    train, work = ladder.recipe.train, ladder.work
    step_tokens = work.mean_tokens * train.micro_batch * train.gradient_accumulation
    if device.operations_per_second is None:
        return Speed(None, None, None, overhead)
    plain = sum(_operations(ladder.standing, sequence.document_lengths) for sequence in work.sequences)
    per_token = plain / sum(sequence.tokens for sequence in work.sequences) * (1 + overhead)
    rate = device.operations_per_second / per_token
    return Speed(rate, step_tokens / rate, steps * step_tokens / rate, overhead)


def _operations(standing: Standing, lengths: tuple[int, ...]) -> float:
    """Of one forward and one backward pass over documents of these lengths."""
    linear = 4 * (standing.active_parameters + standing.head_parameters) + 6 * standing.trained_parameters
    attention = 3.5 * 2 * standing.attention_width * max(1, len(standing.layers))
    return sum(linear * length + attention * length * length for length in lengths)
