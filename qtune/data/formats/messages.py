"""A list of messages: role/content, from/value, or human/assistant pairs; tools, calls of them and their results."""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

from qtune.data.formats import BadRow, Call, DataFormat, Message, RowFault, Values, held, kind_of, system_of, text_of
from qtune.data.formats.tool_calls import (
    bad_call,
    call_of,
    calls_in_text,
    calls_of,
    json_text,
    read_literal,
    tools_text,
)

ROLE_BY_NAME = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "tool_response"), "tool"),
}
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
THOUGHT_PARTS = ("thinking", "reasoning")  # types of parts of a content
CALL_ROLES = ("function_call", "tool_call")
WEIGHTS = ("weight", "loss_weight")
ID_DIGITS = 9  # of ids that a row does not have: Mistral's templates refuse any other number of characters
TOOLS_IN_SYSTEM = re.compile(r"<tools>\s*([\[{].*?)\s*</tools>", re.DOTALL)  # as Hermes' sets have them
RESULT_IN_TEXT = re.compile(r"\s*<tool_response>\s*(.*?)\s*</tool_response>\s*", re.DOTALL)
Numbered = tuple[int, Message]


def read_turns(values: Values, system: str | None) -> tuple[Message, ...]:
    """Every turn in order, the last of them an assistant's."""
    turns = values["messages"]
    if not isinstance(turns, list):
        raise BadRow(RowFault.WRONG_SHAPE, f"the messages are {kind_of(turns)}, not a list")
    if not turns:
        raise BadRow(RowFault.EMPTY_TEXT, "the list of messages is empty")
    in_system = tools_of_system(turns)
    calls_tools = bool(in_system or values.get("tools"))
    numbered = [
        (number, message)
        for number, turn in enumerate(turns, start=1)
        if not (in_system and number == 1)
        for message in _turn(number, turn, calls_tools)
    ]
    messages = paired(numbered)
    if not messages or messages[-1].role != "assistant":
        last = messages[-1].role if messages else "system"
        raise BadRow(RowFault.MISSING_ANSWER, f"the last message is the {last}'s, so there is no answer to learn")
    if not any(message.is_trained for message in messages if message.role == "assistant"):
        raise BadRow(RowFault.MISSING_ANSWER, "every answer has the weight 0, so there is no answer to learn")
    return (*(() if messages[0].role == "system" else system_of(values, system)), *messages)


def tools_of_system(turns: Sequence[Any]) -> str:
    """The tools that the first message lists in <tools>, which the template writes in its own way; "" for none."""
    first = turns[0] if turns else None
    if not isinstance(first, dict) or first.get("role", first.get("from")) != "system":
        return ""
    content = first.get("content", first.get("value"))
    listed = TOOLS_IN_SYSTEM.search(content) if isinstance(content, str) else None
    if listed is None:
        return ""
    whole = read_literal(listed[1])
    return tools_text(whole if whole is not None else [line for line in listed[1].splitlines() if line.strip()])


def tools_of_turns(values: Values) -> str:
    """Those of the row's own column, else those that its system prompt lists."""
    return tools_text(values.get("tools")) or tools_of_system(values["messages"])


def paired(numbered: Sequence[Numbered]) -> list[Message]:
    """The messages, every result with the id of its call, and calls that follow one another in one message.

    A result belongs to the first call that waits for one. Raises BadRow for a result that no call waits for, and for a
    call that is answered by nothing.
    """
    messages: list[Message] = []
    waiting: list[tuple[Call, bool]] = []  # and whether the id is the row's own
    for number, message in numbered:
        if message.role == "tool":
            messages.append(_answered(number, message, waiting))
            continue
        joins = bool(message.calls and not message.content and messages and messages[-1].calls)
        if waiting and not joins:
            raise bad_call(f"message {number} comes before the result of the call of {waiting[0][0].name}")
        if message.calls:
            made, own = sum(len(each.calls) for each in messages), [bool(call.id) for call in message.calls]
            message = dataclasses.replace(message, calls=_with_ids(message.calls, made))
            waiting += zip(message.calls, own, strict=True)
        if joins:
            before = messages.pop()
            message = dataclasses.replace(before, calls=before.calls + message.calls)
        messages.append(message)
    if waiting and messages[-1].role == "tool":
        raise bad_call(f"the call of {waiting[0][0].name} has no result, and others of its message have one")
    return messages


def _with_ids(calls: Sequence[Call], made: int) -> tuple[Call, ...]:
    return tuple(
        call if call.id else dataclasses.replace(call, id=f"{made + number:0{ID_DIGITS}}")
        for number, call in enumerate(calls, start=1)
    )


def _answered(number: int, result: Message, waiting: list[tuple[Call, bool]]) -> Message:
    """The result with the id and the name of its call, which waits no more."""
    if not waiting:
        raise bad_call(f"message {number} is a result, and no call before it waits for one")
    call, is_own = waiting[0]
    if is_own and result.call_id and result.call_id != call.id:
        known = any(result.call_id == each.id for each, _ in waiting)
        told = f"but the call {call.id!r} comes first: results stand in the order of their calls"
        raise bad_call(
            f"message {number} answers the call {result.call_id!r}, {told if known else 'which nobody made'}"
        )
    if result.name and result.name != call.name:
        raise bad_call(f"message {number} is a result of {result.name}, and the call of {call.name} comes first")
    waiting.pop(0)
    return dataclasses.replace(result, call_id=call.id, name=call.name)


def _turn(number: int, turn: Any, calls_tools: bool) -> list[Message]:
    """The message of one turn, or both of a pair; none for a system prompt that says nothing."""
    if not isinstance(turn, dict):
        raise BadRow(RowFault.WRONG_SHAPE, f"message {number} is {kind_of(turn)}, not an object with role and content")
    if "human" in turn and "assistant" in turn:
        return [Message(ROLE_BY_NAME[key], _content(number, turn[key])) for key in ("human", "assistant")]
    name, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if name is None:
        raise BadRow(RowFault.UNKNOWN_ROLE, f"message {number} has no role")
    if not isinstance(name, str) or name not in ROLE_BY_NAME:
        told = f"message {number} has the role {name!r}, which does not exist: system, user, assistant or tool"
        raise BadRow(RowFault.UNKNOWN_ROLE, told)
    role = ROLE_BY_NAME[name]
    if role == "system" and (content is None or content == ""):
        return []
    if role == "tool":
        return _results(number, turn, content)
    if role == "assistant":
        return [_answer(number, name, turn, content, calls_tools)]
    return [Message(role, _content(number, content))]


def _answer(number: int, name: str, turn: Values, content: Any, calls_tools: bool) -> Message:
    is_trained, where = _is_trained(number, turn), f"message {number}"
    if name in CALL_ROLES:
        return Message("assistant", "", is_trained, calls_of(content, where))
    thought, content = _thought(number, turn, content)
    calls: tuple[Call, ...] = ()
    if turn.get("tool_calls"):
        calls = calls_of(turn["tool_calls"], where)
    elif turn.get("function_call"):
        calls = (call_of(turn["function_call"], where),)
    if calls and content in (None, "", []):
        return Message("assistant", "", is_trained, calls, thought=thought)
    text = _content(number, content)
    if calls_tools and not calls:
        text, calls = calls_in_text(text, where)
    return Message("assistant", text, is_trained, calls, thought=thought)


def _thought(number: int, turn: Values, content: Any) -> tuple[str, Any]:
    """What is thought before an answer, in a field of its own or in parts of the content, and what is left of that."""
    told = next((turn[key] for key in THOUGHTS if turn.get(key)), "")
    parts = content if isinstance(content, list) else []
    thinking = [part for part in parts if isinstance(part, dict) and part.get("type") in THOUGHT_PARTS]
    if not told and thinking:
        told = _content(
            number, [{"text": part.get(part["type"], part.get("text", part.get("value")))} for part in thinking]
        )
        content = [part for part in parts if part not in thinking]
    if not isinstance(told, str):
        raise BadRow(RowFault.WRONG_SHAPE, f"the thought of message {number} is {kind_of(told)}, not text")
    return told if told.strip() else "", content


def _results(number: int, turn: Values, content: Any) -> list[Message]:
    """What a tool gave, as text; several where one message holds a <tool_response> for each."""
    is_parts = isinstance(content, list) and all(isinstance(part, dict) and "type" in part for part in content)
    text = _content(number, content) if is_parts and content else content
    text = "" if text is None else text if isinstance(text, str) else json_text(text)
    blocks = RESULT_IN_TEXT.findall(text)
    texts = blocks if blocks and not RESULT_IN_TEXT.sub("", text) else [text]
    name, own_id = turn.get("name"), turn.get("tool_call_id")
    if len(texts) > 1:
        name = own_id = None
    return [
        Message("tool", each, call_id="" if own_id is None else str(own_id), name=name if isinstance(name, str) else "")
        for each in texts
    ]


def _is_trained(number: int, turn: Values) -> bool:
    """OpenAI's `weight` of an answer: 0 is read only, 1 is trained, as one without it is; `"train": false` is 0."""
    chosen = turn.get("train")
    if isinstance(chosen, bool) and not chosen:
        return False
    weight = next((turn[key] for key in WEIGHTS if turn.get(key) is not None), None)
    if weight is None:
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
        yield from held(turn, (role, content, *_read_of(turn)))
        if not _is_answer(turn) and any(turn.get(key) for key in WEIGHTS):
            yield "weight of a question"
        for part in turn[content] if isinstance(turn.get(content), list) else ():
            if isinstance(part, dict):
                yield from held(part, ("type", "text" if "text" in part else "value", *THOUGHT_PARTS))


def _read_of(turn: Values) -> tuple[str, ...]:
    """The fields that are read beside the role and the content."""
    if _is_answer(turn):
        return (*WEIGHTS, "train", "tool_calls", "function_call", *THOUGHTS)
    is_result = ROLE_BY_NAME.get(str(turn.get("role", turn.get("from")))) == "tool"
    return (*WEIGHTS, "name", "tool_call_id") if is_result else WEIGHTS


MESSAGES = DataFormat(
    name="messages",
    description="messages with `role` and `content`, of which every answer and every call of a tool is learned",
    fields={"messages": ("messages",), "system": ("system",), "tools": ("tools", "functions"), "check": ()},
    needed=("messages",),
    read=read_turns,
    tools=tools_of_turns,
    unread=unread_of_turns,
    order=10,
)
