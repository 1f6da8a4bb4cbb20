"""What stands in rows and is read by nobody: columns, and fields of messages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qtune.units import counted

# Names under which data hold what another trainer learns, leaves out or shows, and what is to be known of each. Other
# columns (an id, a source) are there to be ignored.
THOUGHTS = "The answer is learned without it; a column named in data.columns.thought is learned before the answer."
TOOLS = "The model is shown no tools."
MASKS = "It leaves nothing out: every answer is learned. What leaves one out is its `weight`, 0, or `train`, false."
PREFERENCES = 'Every answer is learned as a good one; train.objective = "dpo" or "orpo" learns from pairs.'
SAID_BESIDE = "what is said beside a call"
MATTERS = {
    SAID_BESIDE: "The chat template leaves it out: the call is learned without it.",
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking", "thought", "thoughts", "think"), THOUGHTS),
    **dict.fromkeys(("tools", "functions", "tool_calls", "function_call", "tool_call_id"), TOOLS),
    **dict.fromkeys(
        ("weight", "weight of a question", "train", "trainable", "training", "loss", "loss_weight", "mask"), MASKS
    ),
    **dict.fromkeys(("chosen", "rejected"), PREFERENCES),
}


@dataclass(frozen=True)
class Unused:
    """A column, or a field of messages, and the usable rows in which it holds something.

    `advice` is there where leaving it out changes what is learned.
    """

    field: str
    rows: int
    advice: str | None

    @property
    def sentence(self) -> str:
        return unused_sentence(self.field, self.rows)


def unused_of(rows_by_field: Mapping[str, int]) -> tuple[Unused, ...]:
    """Those that matter first."""
    every = [Unused(field, rows, MATTERS.get(field.lower())) for field, rows in rows_by_field.items()]
    return tuple(sorted(every, key=lambda unused: unused.advice is None))


def unused_line(unused: Sequence[Unused]) -> str:
    """Several in one line: `id` (40 rows), `source` (40 rows)."""
    return ", ".join(f"`{each.field}` ({counted(each.rows, 'row')})" for each in unused)


def unused_sentence(field: str, rows: int) -> str:
    return f"`{field}` stands in {counted(rows, 'row')} and is not used."
