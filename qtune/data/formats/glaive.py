"""One text a conversation, `USER: … ASSISTANT: <functioncall> {…} FUNCTION RESPONSE: …`, as Glaive's sets have it."""

import json
import re

from qtune.data.formats import BadRow, Call, DataFormat, Message, RowFault, Values, text_of
from qtune.data.formats.messages import paired
from qtune.data.formats.tool_calls import bad_call, call_of, tools_text

TURN = re.compile(r"^\s*(USER|ASSISTANT|FUNCTION RESPONSE):\s?", re.MULTILINE)
ROLES = {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}
END, CALL = "<|endoftext|>", "<functioncall>"
QUOTED = re.compile(r'("arguments"\s*:\s*)\'(.*)\'(\s*\}\s*)$', re.DOTALL)
OFFERED = re.compile(r"\s*You are a helpful assistant with access to the following functions.*?-?\s*$", re.DOTALL)


def _read(values: Values, system: str | None) -> tuple[Message, ...]:
    parts = TURN.split(text_of(values.get("chat"), "chat"))
    if len(parts) < 3:
        raise BadRow(RowFault.WRONG_SHAPE, "the chat has no USER: and ASSISTANT:")
    numbered = [
        (number, _turn(number, ROLES[who], said.replace(END, "").strip()))
        for number, (who, said) in enumerate(zip(parts[1::2], parts[2::2], strict=True), start=1)
    ]
    if numbered[-1][1].role != "assistant":
        raise BadRow(RowFault.MISSING_ANSWER, "the last turn is not the assistant's, so there is no answer to learn")
    own = _system(values)[0] or system
    return (*((Message("system", own),) if own else ()), *paired(numbered))


def _turn(number: int, role: str, said: str) -> Message:
    if role == "assistant" and CALL in said:
        before, _, call = said.partition(CALL)
        return Message(role, before.strip(), calls=(_call(call.strip(), f"turn {number}"),))
    return Message(role, said if role == "tool" else text_of(said, f"content of turn {number}"))


def _call(text: str, where: str) -> Call:
    """The arguments stand between single quotes, as no JSON does."""
    quoted = QUOTED.search(text)
    if quoted:
        text = text[: quoted.start()] + quoted[1] + json.dumps(quoted[2].replace("\\'", "'")) + quoted[3]
    try:
        return call_of(json.loads(text), where)
    except (ValueError, RecursionError):
        raise bad_call(f"the call in {where} is no JSON: {text[:60]!r}") from None


def _system(values: Values) -> tuple[str, str]:
    """What the system prompt says, and the tools that it lists, one JSON object behind another."""
    text = values.get("system") or ""
    if not isinstance(text, str):
        return "", ""
    text = text.removeprefix("SYSTEM:").strip()
    start = text.find("{")
    if start < 0:
        return text, ""
    tools, rest, decoder = [], text[start:], json.JSONDecoder()
    while rest.startswith("{"):
        try:
            tool, end = decoder.raw_decode(rest)
        except (ValueError, RecursionError):
            raise bad_call("the system prompt lists functions that are no JSON") from None
        tools.append(tool)
        rest = rest[end:].lstrip(" ,\n")
    said = OFFERED.sub("", text[:start]).strip()
    return "\n\n".join(part for part in (said, rest.strip()) if part), tools_text(tools)


def _tools(values: Values) -> str:
    return _system(values)[1]


GLAIVE = DataFormat(
    name="glaive",
    description="one text of USER:, ASSISTANT: and FUNCTION RESPONSE:, tools in the system prompt",
    fields={"chat": ("chat",), "system": ("system",), "check": ()},
    needed=("chat",),
    read=_read,
    tools=_tools,
    order=22,
)
