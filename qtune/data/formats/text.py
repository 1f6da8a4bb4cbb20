"""Plain text, all of it to be learned."""

from qtune.data.formats import DataFormat, Values, text_of


def _read(values: Values, system: str | None) -> str:
    return text_of(values.get("text"), "text")


TEXT = DataFormat(
    name="text",
    description="a text that is learned whole, without a prompt",
    fields={"text": ("text",)},
    needed=("text",),
    read=_read,
    is_text=True,
    order=60,
)
