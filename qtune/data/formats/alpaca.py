"""An instruction with an optional input, and the output; earlier turns as `history`."""

from qtune.data.formats import DataFormat
from qtune.data.formats.prompt_completion import THOUGHTS, read_pair

ALPACA = DataFormat(
    name="alpaca",
    description="an instruction, an optional input under it, and the output that is learned",
    fields={
        "prompt": ("instruction",),
        "completion": ("output", "response"),
        "input": ("input", "context"),
        "system": ("system",),
        "history": ("history",),
        "thought": THOUGHTS,
        "check": (),
    },
    needed=("prompt", "completion"),
    read=read_pair,
    order=30,
)
