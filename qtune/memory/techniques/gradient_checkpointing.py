"""Decoder layers that are recomputed in the backward pass: `memory.gradient_checkpointing`."""

from collections.abc import Sequence

from qtune.memory.techniques import LiveModel, Step, Technique, Techniques, auto_or_count
from qtune.memory.techniques.standing import Standing

PASS_AGAIN = (
    0.5  # a forward pass beside one forward and one backward, which cost alike: frozen weights have no gradient
)


def _cost(techniques: Techniques, standing: Standing) -> float:
    weights_share = 1 - standing.attention_share  # attention is another rung's
    return float(PASS_AGAIN * weights_share * techniques.recomputed_layers / max(1, len(standing.layers)))


class RecomputedLayers(Technique):
    """Counts decoder layers."""

    name, order, off = "recomputed_layers", 10, 0
    key, setting = "keep_layers", auto_or_count(0)
    description = "Layers that keep their activations instead of being recomputed; each is faster and larger."
    needs_layers = True
    steps = (
        Step(
            name,
            "recompute layers",
            10,
            "activations are made again in the backward pass",
            lambda on, standing: on.having(recomputed_layers=len(standing.layers)),
            _cost,
        ),
    )

    def settled(self, techniques: Techniques, value: int, standing: Standing) -> Techniques:
        return techniques.having(recomputed_layers=max(0, len(standing.layers) - value))

    def is_asked_for(self, value: int) -> bool:
        return True  # whatever is kept, keeping some and not others takes layers that run one by one

    def joined(self, wanted: int, now: int) -> int:
        return max(wanted, now)

    def amounts(self, value: int) -> Sequence[int]:
        return range(value)

    def amount(self, value: int, standing: Standing) -> str:
        return f", {value} of {len(standing.layers)}"

    def switch_on(self, live: LiveModel, wanted: Techniques) -> None:
        live.runner.recompute(wanted.recomputed_layers)


RECOMPUTED_LAYERS = RecomputedLayers()
