"""A question, the tools at hand and the calls that answer it, as xLAM's and APIGen's sets have them."""

from typing import Any

from qtune.data.formats import BadRow, DataFormat, Message, RowFault, Values, system_of, text_of
from qtune.data.formats.messages import paired
from qtune.data.formats.tool_calls import calls_of, tools_text


def _read(values: Values, system: str | None) -> tuple[Message, ...]:
    """A question, and an answer that calls; text where the set says that no tool fits."""
    question = Message("user", text_of(values.get("prompt"), "question", RowFault.MISSING_PROMPT))
    answers: Any = values.get("calls")
    if answers in (None, "", "[]", []):
        raise BadRow(RowFault.MISSING_ANSWER, "the answers hold no call, so there is nothing to learn")
    answer = Message("assistant", "", calls=calls_of(answers, "the answers"))
    return (*system_of(values, system), *paired([(1, question), (2, answer)]))


def _tools(values: Values) -> str:
    return tools_text(values.get("tools"))


XLAM = DataFormat(
    name="xlam",
    description="a query, the tools at hand, and the calls that are learned as `answers`",
    fields={
        "prompt": ("query", "question", "instruction"),
        "calls": ("answers", "calls"),
        "tools": ("tools", "functions"),
        "system": ("system",),
        "check": (),
    },
    needed=("prompt", "calls", "tools"),
    read=_read,
    tools=_tools,
    order=25,
)
