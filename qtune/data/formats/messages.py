"""A list of messages: role/content, from/value, or human/assistant pairs."""

from collections.abc import Iterator
from typing import Any

from qtune.data.formats import BadRow, DataFormat, Message, RowFault, Values, held, kind_of, system_of, text_of

ROLE_BY_NAME = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}
TOOL_ROLES = ("tool", "function", "function_call", "observation", "ipython")


def read_turns(values: Values, system: str | None) -> tuple[Message, ...]:
    """Every turn in order, the last of them an assistant's."""
    turns = values["messages"]
    if not isinstance(turns, list):
        raise BadRow(RowFault.WRONG_SHAPE, f"the messages are {kind_of(turns)}, not a list")
    if not turns:
        raise BadRow(RowFault.EMPTY_TEXT, "the list of messages is empty")
    messages = [message for number, turn in enumerate(turns, start=1) for message in _turn(number, turn)]
    if not messages or messages[-1].role != "assistant":
        last = messages[-1].role if messages else "system"
        raise BadRow(RowFault.MISSING_ANSWER, f"the last message is the {last}'s, so there is no answer to learn")
    if not any(message.is_trained for message in messages if message.role == "assistant"):
        raise BadRow(RowFault.MISSING_ANSWER, "every answer has the weight 0, so there is no answer to learn")
    return (*(() if messages[0].role == "system" else system_of(values, system)), *messages)


def _turn(number: int, turn: Any) -> list[Message]:
    """The message of one turn, or both of a pair; none for a system prompt that says nothing."""
    if not isinstance(turn, dict):
        raise BadRow(RowFault.WRONG_SHAPE, f"message {number} is {kind_of(turn)}, not an object with role and content")
    if "human" in turn and "assistant" in turn:
        return [Message(ROLE_BY_NAME[key], _content(number, turn[key])) for key in ("human", "assistant")]
    if turn.get("tool_calls") or turn.get("function_call"):
        raise BadRow(RowFault.TOOL_CALL, f"message {number} calls a tool, and qtune trains text only")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if role is None:
        raise BadRow(RowFault.UNKNOWN_ROLE, f"message {number} has no role")
    if role in TOOL_ROLES:
        raise BadRow(
            RowFault.TOOL_CALL, f"message {number} is a tool's (its role is {role!r}), and qtune trains text only"
        )
    if not isinstance(role, str) or role not in ROLE_BY_NAME:
        told = f"message {number} has the role {role!r}, which does not exist: system, user or assistant"
        raise BadRow(RowFault.UNKNOWN_ROLE, told)
    if role == "system" and (content is None or content == ""):
        return []
    return [Message(ROLE_BY_NAME[role], _content(number, content), _is_trained(number, turn))]


def _is_trained(number: int, turn: Values) -> bool:
    """OpenAI's `weight` of an answer: 0 is read only, 1 is trained, as one without it is. No other turn is trained."""
    weight = turn.get("weight")
    if not _is_answer(turn) or weight is None:
        return True
    if isinstance(weight, bool) or weight not in (0, 1):
        given = weight if isinstance(weight, int | float) and not isinstance(weight, bool) else kind_of(weight)
        told = f"the weight of message {number} is {given}; 0 reads an answer only, and 1 trains it"
        raise BadRow(RowFault.UNKNOWN_WEIGHT, told)
    return bool(weight)


def _is_answer(turn: Values) -> bool:
    return ROLE_BY_NAME.get(str(turn.get("role", turn.get("from")))) == "assistant"


def _content(number: int, content: Any) -> str:
    """Text, or the texts of a list of parts joined."""
    if isinstance(content, list):
        parts = [part.get("text", part.get("value")) if isinstance(part, dict) else None for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) < len(parts):
            raise BadRow(RowFault.WRONG_SHAPE, f"message {number} holds a part that is no text")
        content = "".join(texts)
    if content is None:
        raise BadRow(RowFault.EMPTY_TEXT, f"the content of message {number} is null, not text")
    return text_of(content, f"content of message {number}")


def unread_of_turns(values: Values) -> Iterator[str]:
    """The fields of messages, and of the parts they are made of, that hold something and are not read."""
    for turn in values["messages"]:
        if "human" in turn and "assistant" in turn:
            yield from held(turn, ("human", "assistant"))
            continue
        role, content = ("role" if "role" in turn else "from"), ("content" if "content" in turn else "value")
        yield from held(turn, (role, content, "weight"))
        if turn.get("weight") and not _is_answer(turn):
            yield "weight of a question"
        for part in turn[content] if isinstance(turn.get(content), list) else ():
            yield from held(part, ("type", "text" if "text" in part else "value"))


MESSAGES = DataFormat(
    name="messages",
    description="messages with `role` and `content`, of which every answer is learned",
    fields={"messages": ("messages",), "system": ("system",), "check": ()},
    needed=("messages",),
    read=read_turns,
    unread=unread_of_turns,
    order=10,
)
