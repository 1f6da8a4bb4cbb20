"""What the user asks and what the model is to answer, a column each."""

from typing import Any

from qtune.data.formats import BadRow, DataFormat, Message, RowFault, Values, kind_of, system_of, text_of

THOUGHTS = ("reasoning_content", "thinking")


def read_pair(values: Values, system: str | None) -> tuple[Message, ...]:
    """Prompt, optional input under it, and completion."""
    prompt = text_of(values.get("prompt"), "prompt", RowFault.MISSING_PROMPT)
    extra = _input(values.get("input"))
    if extra:
        prompt = f"{prompt}\n\n{extra}"
    completion = text_of(values.get("completion"), "answer", RowFault.MISSING_ANSWER)
    thought = values.get("thought") or ""
    if not isinstance(thought, str):
        raise BadRow(RowFault.WRONG_SHAPE, f"the thought is {kind_of(thought)}, not text")
    turns = [Message("user", prompt), Message("assistant", completion, thought=thought.strip())]
    return (*system_of(values, system), *_history(values.get("history") or []), *turns)


def _input(extra: Any) -> str:
    """The extra input, stripped; a list of texts is joined as paragraphs."""
    parts = extra if isinstance(extra, list) else [] if extra is None else [extra]
    for part in parts:
        if not isinstance(part, str):
            raise BadRow(RowFault.WRONG_SHAPE, f"the input is {kind_of(part)}, not text")
    return "\n\n".join(parts).strip()


def _history(past: Any) -> list[Message]:
    """Earlier turns as alpaca has them: a list of [question, answer]."""
    pairs = past if isinstance(past, list) else [past]
    if not all(isinstance(pair, list) and [type(part) for part in pair] == [str, str] for pair in pairs):
        raise BadRow(RowFault.WRONG_SHAPE, "the history is not a list of question and answer texts")
    return [Message(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)]


PROMPT_COMPLETION = DataFormat(
    name="prompt-completion",
    description="a prompt and the completion that is learned",
    fields={
        "prompt": ("prompt",),
        "completion": ("completion", "response"),
        "input": (),
        "system": ("system",),
        "thought": THOUGHTS,
        "check": (),
    },
    needed=("prompt", "completion"),
    read=read_pair,
    order=40,
)
