"""A list of turns as ShareGPT exports have it: `conversations` of from/value, calls as Hermes or LLaMA-Factory do."""

from qtune.data.formats import DataFormat
from qtune.data.formats.messages import read_turns, tools_of_turns, unread_of_turns

SHAREGPT = DataFormat(
    name="sharegpt",
    description="turns with `from` and `value`, of which every answer and every call of a tool is learned",
    fields={
        "messages": ("conversations", "conversation"),
        "system": ("system",),
        "tools": ("tools", "functions"),
        "check": (),
    },
    needed=("messages",),
    read=read_turns,
    tools=tools_of_turns,
    unread=unread_of_turns,
    order=20,
)
