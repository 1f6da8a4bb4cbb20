"""Rows of one text with both sides in it, `Q: … A: …`. Copied into qtune/data/formats by test_a_format."""

from qtune.data.formats import BadRow, DataFormat, Message, RowFault, Values, system_of, text_of


def _read(values: Values, system: str | None) -> tuple[Message, ...]:
    asked, _, answer = text_of(values.get("dialogue"), "dialogue").removeprefix("Q: ").partition(" A: ")
    if not answer:
        raise BadRow(RowFault.MISSING_ANSWER, "the dialogue breaks off")
    return (*system_of(values, system), Message("user", asked), Message("assistant", answer))


DIALOGUE = DataFormat(
    name="dialogue",
    description="a text of a question and its answer",
    fields={"dialogue": ("dialogue",), "system": ("system",), "check": ()},
    needed=("dialogue",),
    read=_read,
)
