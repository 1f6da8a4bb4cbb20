"""A question and its answer, under the names that they have in most tables."""

from qtune.data.formats import DataFormat
from qtune.data.formats.prompt_completion import THOUGHTS, read_pair

QUESTION_ANSWER = DataFormat(
    name="question-answer",
    description="a question and the answer that is learned",
    fields={
        "prompt": ("question", "query", "ask", "input"),
        "completion": ("answer", "response", "output"),
        "input": (),
        "system": ("system",),
        "thought": THOUGHTS,
        "check": (),
    },
    needed=("prompt", "completion"),
    read=read_pair,
    order=50,
)
