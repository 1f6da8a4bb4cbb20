"""Attention that is run again in recomputed layers, or whose output is kept: `memory.kept_attention`."""

from collections.abc import Mapping, Sequence
from typing import Any

from qtune.memory.techniques import LiveModel, Step, Technique, Techniques, auto_or_count
from qtune.memory.techniques.standing import Standing


def _cost(techniques: Techniques, standing: Standing) -> float:
    again = min(techniques.recomputed_attention, techniques.recomputed_layers)
    return standing.attention_again * again / max(1, len(standing.layers))


class RecomputedAttention(Technique):
    """Counts the first decoder layers, of which attention is run again if they are recomputed; others keep what it
    returned. It is off where all of them do, which holds most."""

    name, order, off = "recomputed_attention", 80, 0
    key, setting = "keep_attention", auto_or_count(0)
    description = "Last layers that keep attention's output if they are recomputed; faster for long documents."
    needs_layers = True
    steps = (
        Step(
            name,
            "attention run again",
            15,
            "instead of keeping its output for the backward pass",
            lambda on, standing: on.having(recomputed_attention=max(on.recomputed_attention, on.recomputed_layers)),
            _cost,
        ),
    )

    def settled(self, techniques: Techniques, value: int, standing: Standing) -> Techniques:
        return techniques.having(recomputed_attention=max(0, len(standing.layers) - value))

    def is_asked_for(self, value: int) -> bool:
        return value > 0

    def unsaid(self, planned: Mapping[str, Any]) -> int:
        """A plan that does not say so recomputed layers whole."""
        return int(planned.get("recomputed_layers", 0))

    def joined(self, wanted: int, now: int) -> int:
        return max(wanted, now)

    def amounts(self, value: int) -> Sequence[int]:
        return range(value)

    def amount(self, value: int, standing: Standing) -> str:
        return f", in {value} of {len(standing.layers)}"

    def is_in_a_pass(self, techniques: Techniques) -> bool:
        return bool(techniques.recomputed_layers)

    def refusal(self, model: Any, layers: Sequence[Any]) -> str | None:
        from qtune.memory.kept_attention import drops_out

        return "its attention drops out weights, so nothing is kept of it" if any(map(drops_out, layers)) else None

    def switch_on(self, live: LiveModel, wanted: Techniques) -> None:
        live.runner.attention_again = wanted.recomputed_attention


RECOMPUTED_ATTENTION = RecomputedAttention()
