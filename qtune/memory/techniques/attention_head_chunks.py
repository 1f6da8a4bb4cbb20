"""Attention a few heads at a time: `memory.attention_head_chunks`."""

from collections.abc import Sequence
from typing import Any

from qtune.memory.techniques import LiveModel, Step, Technique, Techniques, auto_or_count
from qtune.memory.techniques.standing import Standing

MOST_GROUPS = 8  # chosen: more of them save little beside what one head and the rest of a layer hold
ATTENTION_AGAIN = 0.10  # of a step's time: an estimate, not measured on a card yet


def _most(standing: Standing) -> int:
    """As many groups as divide the key/value heads."""
    return max(n for n in range(1, MOST_GROUPS + 1) if standing.key_value_heads % n == 0)


class HeadGroups(Technique):
    """Counts groups; one group is all heads at once."""

    name, order, off = "head_groups", 70, 1
    key, setting = "head_groups", auto_or_count(1)
    description = "Pieces the attention heads are run in; more hold less and run attention once more."
    needs_layers = True
    steps = (
        Step(
            name,
            "heads in groups",
            60,
            "attention runs once more",
            lambda on, standing: on.having(head_groups=_most(standing)),
            lambda on, standing: ATTENTION_AGAIN,
        ),
    )

    def fault(self, value: int, standing: Standing) -> str | None:
        heads = standing.key_value_heads
        if heads % value == 0:
            return None
        fitting = ", ".join(str(n) for n in range(2, heads + 1) if heads % n == 0)
        return f"does not divide the {heads} key/value heads; {fitting} would"

    def refusal(self, model: Any, layers: Sequence[Any]) -> str | None:
        from qtune.memory.attention_head_chunks import why_not_grouped

        return next(filter(None, map(why_not_grouped, layers)), None)

    def amounts(self, value: int) -> Sequence[int]:
        return [n for n in range(2, value) if value % n == 0]

    def amount(self, value: int, standing: Standing) -> str:
        return f", {value}"

    def switch_on(self, live: LiveModel, wanted: Techniques) -> None:
        from qtune.memory.attention_head_chunks import group_heads

        for layer in live.layers:
            group_heads(layer, wanted.head_groups)


HEAD_GROUPS = HeadGroups()
