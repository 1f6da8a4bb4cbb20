"""A list of turns as ShareGPT exports have it: `conversations` of from/value."""

from qtune.data.formats import DataFormat
from qtune.data.formats.messages import read_turns, unread_of_turns

SHAREGPT = DataFormat(
    name="sharegpt",
    description="turns with `from` and `value`, of which every answer is learned",
    fields={"messages": ("conversations", "conversation"), "system": ("system",), "check": ()},
    needed=("messages",),
    read=read_turns,
    unread=unread_of_turns,
    order=20,
)
