"""A question with an answer that is to be preferred and one that is not, in the shapes that sets of preferences have.

An answer may be a text, a message, a list of messages, or, as in Anthropic's HH, a transcript of `Human:` and
`Assistant:` turns. It may begin with the question, which then stands nowhere else or in a column beside.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

from qtune.data.formats import BadRow, DataFormat, Message, Pair, RowFault, Values, kind_of, text_of
from qtune.data.formats.messages import ROLE_BY_NAME, read_turns, tools_of_turns, unread_of_turns

TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")  # of a transcript
ANSWERS = ("chosen", "rejected")


def _read(values: Values, system: str | None) -> Pair:
    chosen, rejected = (_conversation(values, name, system) for name in ANSWERS)
    shared = _shared(chosen, rejected)
    return Pair(*(_learned_from(shared, messages) for messages in (chosen, rejected)))


def _conversation(values: Values, name: str, system: str | None) -> tuple[Message, ...]:
    try:
        return read_turns({**values, "messages": _turns(values, name)}, system)
    except BadRow as bad:
        raise BadRow(bad.fault, f"{name}: {bad}") from None


def _turns(values: Values, name: str) -> list[Any]:
    """The messages of an answer and of what stands before it, as messages are written in rows."""
    answer, before = values[name], _prompt(values)
    if isinstance(answer, dict):
        return [*before, answer]
    if isinstance(answer, list):
        return answer if not answer or not before or _asks(answer[0]) else [*before, *answer]
    text = text_of(answer, "answer", RowFault.MISSING_ANSWER)
    whole = _transcript(text)
    if whole is not None and (not before or len(whole) > 1):
        return whole
    if not before:
        raise BadRow(
            RowFault.MISSING_PROMPT, "there is no prompt, and the answer is no transcript of Human: and Assistant:"
        )
    return [*before, {"role": "assistant", "content": text}]


def _asks(turn: Any) -> bool:
    """Whether a list of messages that begins with this one begins with the question."""
    role = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
    return isinstance(role, str) and ROLE_BY_NAME.get(role) in ("system", "user")


def _prompt(values: Values) -> list[Any]:
    """The messages of the column before the answers; none where the answers begin with them."""
    turns, prompt, extra = values.get("messages"), values.get("prompt"), values.get("input")
    if turns is not None and not isinstance(turns, list):
        raise BadRow(RowFault.WRONG_SHAPE, f"the messages are {kind_of(turns)}, not a list")
    if turns or prompt is None:
        return turns or []
    if isinstance(prompt, list):
        return prompt
    text = text_of(prompt, "prompt", RowFault.MISSING_PROMPT)
    if extra:
        text = f"{text}\n\n{text_of(extra, 'input')}"
    whole = _transcript(text)
    return whole if whole is not None else [{"role": "user", "content": text}]


def _transcript(text: str) -> list[Any] | None:
    """The turns of `Human: ... Assistant: ...`, but for an answer that is still to come; None for any other text."""
    parts = TURN.split(text)
    if len(parts) < 3 or parts[0].strip():
        return None
    said = zip(parts[1::2], (part.strip() for part in parts[2::2]), strict=True)
    turns = [{"role": "user" if who == "Human" else "assistant", "content": content} for who, content in said]
    return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns


def _shared(chosen: Sequence[Message], rejected: Sequence[Message]) -> int:
    """With how many messages both begin. Raises BadRow where they are the same, or no answer is the first to differ."""
    if chosen == rejected:
        raise BadRow(RowFault.NO_PREFERENCE, "chosen and rejected are the same")
    shorter = min(len(chosen), len(rejected)) - 1
    shared = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter)
    roles = [messages[shared].role for messages in (chosen, rejected)]
    if roles != ["assistant", "assistant"]:
        raise BadRow(
            RowFault.NO_PREFERENCE,
            f"chosen and rejected differ from message {shared + 1} on, which is the {roles[0]}'s and the {roles[1]}'s:"
            " both must answer the same question",
        )
    return shared


def _learned_from(shared: int, messages: Sequence[Message]) -> tuple[Message, ...]:
    return tuple(
        dataclasses.replace(message, is_trained=message.is_trained and number >= shared)
        for number, message in enumerate(messages)
    )


def _tools(values: Values) -> str:
    return tools_of_turns({**values, "messages": _turns(values, "chosen")})


def _unread(values: Values) -> Iterator[str]:
    for name in ANSWERS:
        yield from unread_of_turns({"messages": _turns(values, name)})


PREFERENCES = DataFormat(
    name="preferences",
    description="a question, a chosen and a rejected answer, which dpo and orpo learn from",
    fields={
        "prompt": ("prompt", "instruction", "question", "query"),
        "messages": ("conversations", "conversation", "messages"),
        "chosen": ("chosen",),
        "rejected": ("rejected",),
        "input": ("input",),
        "system": ("system",),
        "tools": ("tools", "functions"),
        "check": (),
    },
    needed=ANSWERS,
    read=_read,
    tools=_tools,
    unread=_unread,
    is_pairs=True,
    order=70,
)
