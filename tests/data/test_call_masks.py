"""What is trained of rows that call tools, template by template, against answers written down by hand."""

from pathlib import Path

import pytest
import trl
from test_chat_template import SPECIAL_TOKEN, TEMPLATES, TEMPLATES_OF_TRL, with_template

from qtune.data.chat_template import ChatTemplate, Piece
from qtune.data.formats import Call, Message
from qtune.data.formats.tool_calls import tools_text
from qtune.data.rows import NOT_TRAINED, Conversation, Document
from qtune.data.template_process import Untraceable
from qtune.data.tokenize import Encoder, tokenize
from qtune.recipe.chat_templates import BUILT_IN

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "A city."}},
    "required": ["city"],
}
TOOLS = tools_text([{"name": "get_weather", "description": "The weather.", "parameters": PARAMETERS}])


def calling(*cities: str) -> Message:
    calls = [Call("get_weather", f'{{"city": "{city}"}}', f"call_{i}") for i, city in enumerate(cities, start=1)]
    return Message("assistant", "", calls=tuple(calls))


def result(number: int, said: str = "21 C") -> Message:
    return Message("tool", said, call_id=f"call_{number}", name="get_weather")


ASKED = Message("user", "Weather in Paris?")
# A call whose result is answered, and one more question; calls side by side, with results that are alike; a call at the
# end; a question that needs no tool.
CHATS = {
    "single": [
        *(Message("system", "Be brief."), ASKED, calling("Paris"), result(1), Message("assistant", "It is warm.")),
        *(Message("user", "Thanks"), Message("assistant", "Welcome.")),
    ],
    "parallel": [ASKED, calling("Paris", "Rome"), result(1), result(2), Message("assistant", "Both are warm.")],
    "last": [ASKED, calling("Paris")],
    "none": [ASKED, Message("assistant", "I cannot know.")],
}


def hermes(*cities: str) -> str:
    call = '<tool_call>\n{{"name": "get_weather", "arguments": {{"city": "{}"}}}}\n</tool_call>'
    return "\n".join(call.format(city) for city in cities)


def xml(*cities: str) -> str:
    call = "<tool_call>\n<function=get_weather>\n<parameter=city>\n{}\n</parameter>\n</function>\n</tool_call>"
    return "\n".join(call.format(city) for city in cities)


def llama(*cities: str) -> str:
    return f'{{"name": "get_weather", "parameters": {{"city": "{cities[0]}"}}}}'


def nemo(*cities: str) -> str:
    ids = ("74196fe72", "1b68f83fa")  # nine characters for call_1 and call_2
    calls = [
        f'{{"name": "get_weather", "arguments": {{"city": "{city}"}}, "id": "{number}"}}'
        for city, number in zip(cities, ids, strict=False)
    ]
    return f"[TOOL_CALLS][{', '.join(calls)}]"


def small(*cities: str) -> str:
    ids = ("74196fe72", "1b68f83fa")
    call = '[TOOL_CALLS]get_weather[CALL_ID]{}[ARGS]{{"city": "{}"}}'
    return "".join(call.format(number, city) for city, number in zip(cities, ids, strict=False))


def command(*cities: str) -> str:
    calls = [
        f'    {{"tool_call_id": "{i}", "tool_name": "get_weather", "parameters": {{"city": "{city}"}}}}'
        for i, city in enumerate(cities)
    ]
    return "<|START_ACTION|>[\n" + ",\n".join(calls) + "\n]<|END_ACTION|>"


def lfm(*cities: str) -> str:
    calls = ", ".join(f"get_weather(city='{city}')" for city in cities)
    return f"<|tool_call_start|>[{calls}]<|tool_call_end|>"


def harmony(*cities: str) -> str:
    return f' to=functions.get_weather<|channel|>commentary json<|message|>{{"city": "{cities[0]}"}}'


def gemma(*cities: str) -> str:
    return "".join(f'<|tool_call>call:get_weather{{city:<|"|>{city}<|"|>}}<tool_call|>' for city in cities)


def muse(*cities: str) -> str:
    call = (
        ' to=get_weather<|message|><atem:function_calls>\n<atem:invoke name="get_weather">\n'
        '<atem:parameter name="city">{}</atem:parameter>\n</atem:invoke>\n</atem:function_calls>'
    )
    return "<|eom|><|start|>assistant".join(call.format(city) for city in cities)


def glm(*cities: str) -> str:
    call = "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>{}</arg_value>\n</tool_call>"
    return "\n".join(call.format(city) for city in cities)


# By template: how a call is written, what ends it, how an answer is written, what ends it. One call a message is all
# that some take, and the rest write none or show no tools.
CHATML = "<|im_end|>"
WRITTEN = {
    **dict.fromkeys(
        (
            *("Qwen-QwQ-32B", "Qwen-Qwen2.5-7B-Instruct", "Qwen-Qwen3-0.6B"),
            *("qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_vl"),
        ),
        (hermes, CHATML, "{}", CHATML),
    ),
    "Bielik-11B-v3.0-Instruct": (lambda *cities: "\n" + hermes(*cities), CHATML, "{}", CHATML),
    **dict.fromkeys(("qwen3_5_nothink", "qwen3_5_think", "qwen3_6", "qwen3_8"), (xml, CHATML, "{}", CHATML)),
    **dict.fromkeys(
        ("nemotron_3_nano", "nemotron_3_super", "nemotron_3_5_lightning", "nemotron_3_ultra"),
        (lambda *c: xml(*c) + "\n", CHATML, "{}", CHATML),
    ),
    "chatml": (hermes, CHATML, "{}", CHATML),
    **dict.fromkeys(("lfm2_v2", "lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl"), (lfm, CHATML, "{}", CHATML)),
    # A result follows in the model's own turn, and its first token is the one at which the model stops.
    **dict.fromkeys(
        ("gemma4", "gemma4_v3", "gemma4_v4", "gemma4_v5", "diffusion_gemma"),
        (gemma, "<|tool_response>", "{}", "<turn|>"),
    ),
    "gemma4_v2": (gemma, "<turn|>", "{}", "<turn|>"),
    "glm4moe": (glm, "<|observation|>", "{}", "<|user|>"),  # what begins the next turn ends one
    "muse_glimmer": (muse, "<|eot|>", " to=user<|message|>{}", "<|eot|>"),
    "mistralai-Mistral-Nemo-Instruct-2407": (nemo, "<|end|>", "{}", "<|end|>"),
    "Mistral-Small-3.2-24B-Instruct-2506": (small, "<|end|>", "{}", "<|end|>"),
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": (
        *(command, "<|END_OF_TURN_TOKEN|>", "<|START_RESPONSE|>{}", "<|END_RESPONSE|>"),
    ),
}
ONE_CALL = {
    **dict.fromkeys(
        ("meta-llama-Llama-3.1-8B-Instruct", "meta-llama-Llama-3.2-3B-Instruct", "llama3_1", "llama3_2"),
        (llama, "<|eot_id|>", "{}", "<|eot_id|>"),
    ),
    # An answer that is not the last one ends with a token at which the model does not stop.
    **dict.fromkeys(
        ("openai-gpt-oss-120b", "gptoss"), (harmony, "<|call|>", "<|channel|>final<|message|>{}", "<|return|>")
    ),
}
NO_CALLS = (
    *("HuggingFaceTB-SmolLM3-3B", "LFM2-8B-A1B", "google-gemma-2-2b-it", "ibm-granite-granite-3.3-2B-Instruct"),
    *("microsoft-Phi-3.5-mini-instruct", "cohere", "cohere2", "gemma", "gemma3", "lfm2", "llama3", "phi3", "phi3_5"),
    *("qwen2_5_vl", "alpaca", "plain"),
)
SHOWS_NONE = ("deepseek_r1_distill", "deepseekv3")


def wanted(name: str, chat: str) -> list[str]:
    call, end_of_call, answer, end = {**WRITTEN, **ONE_CALL}[name]
    is_harmony = call is harmony
    if chat == "single":
        earlier = answer.format("It is warm.") + ("" if is_harmony else end)
        return [call("Paris") + end_of_call, earlier, answer.format("Welcome.") + end]
    if chat == "parallel":
        return [call("Paris", "Rome") + end_of_call, answer.format("Both are warm.") + end]
    return [call("Paris") + end_of_call] if chat == "last" else [answer.format("I cannot know.") + end]


def template_text(name: str, material: Path) -> str:
    if name in BUILT_IN and name not in TEMPLATES_OF_TRL:
        return BUILT_IN[name].text
    own = Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
    path = material / "chat_templates" / f"{name}.jinja" if name in TEMPLATES else own
    if not path.is_file():
        pytest.skip(f"there is no {path.name} here")
    return path.read_text(encoding="utf-8")


def template(name: str, material: Path) -> ChatTemplate:
    text = template_text(name, material)
    tokenizer = with_template(text)
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(set(SPECIAL_TOKEN.findall(text)))})
    return ChatTemplate.of(tokenizer)


def test_every_template_is_held_to_something() -> None:
    named = {*WRITTEN, *ONE_CALL, *NO_CALLS, *SHOWS_NONE}
    assert named == {*TEMPLATES, *TEMPLATES_OF_TRL, *BUILT_IN}


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", [*WRITTEN, *ONE_CALL])
def test_calls_and_answers_are_trained_and_nothing_else(material, name: str, chat: str) -> None:
    chats = template(name, material)
    if name in ONE_CALL and chat == "parallel":
        with pytest.raises(Untraceable, match=r"single tool-calls at once|some of several calls in one message"):
            chats.pieces(CHATS[chat], TOOLS)
        return
    pieces = chats.pieces(CHATS[chat], TOOLS)
    assert [piece.text for piece in pieces if piece.trained] == wanted(name, chat)
    read = "".join(piece.text for piece in pieces if not piece.trained)
    assert "The weather." in read
    assert read.count("21 C") == sum(message.role == "tool" for message in CHATS[chat])
    (example,) = tokenize([Conversation(tuple(CHATS[chat]), "r:1", tools=TOOLS)], chats, Encoder.of(chats.tokenizer))
    trained = [label for label in example.labels if label != NOT_TRAINED]
    assert chats.tokenizer.decode(trained) == "".join(wanted(name, chat))
    assert trained[-1] in chats.stop_token_ids


@pytest.mark.parametrize("name", NO_CALLS)
def test_a_template_without_calls_says_what_to_do(material, name: str) -> None:
    with pytest.raises(
        Untraceable, match=r"writes no calls: choose a base whose template does, or name one"
    ) as refused:
        template(name, material).pieces(CHATS["last"], TOOLS)
    has_tokens = "<|im_start|>" in template_text(name, material)  # SmolLM3, LFM2, Qwen2.5-VL
    assert f'chat_template = "{"chatml" if has_tokens else "template.jinja"}"' in str(refused.value)


@pytest.mark.parametrize("chat", CHATS)
def test_qtunes_own_chatml_writes_tools_as_qwen_does(material, chat: str) -> None:
    theirs, ours = (template(name, material) for name in ("Qwen-Qwen2.5-7B-Instruct", "chatml"))
    said = [Message("system", "Be brief."), *(each for each in CHATS[chat] if each.role != "system")]
    assert ours.pieces(said, TOOLS)[0].text.removeprefix("<s>") == theirs.pieces(said, TOOLS)[0].text
    assert ours.pieces(said, TOOLS)[1:] == theirs.pieces(said, TOOLS)[1:]


@pytest.mark.parametrize("name", SHOWS_NONE)
def test_tools_that_a_template_does_not_show_are_not_lost_in_silence(material, name: str) -> None:
    with pytest.raises(Untraceable, match="there are tools, and the chat template does not show them"):
        template(name, material).pieces(CHATS["none"], TOOLS)


SAYING = Message("assistant", "Let me look.", calls=calling("Paris").calls)


@pytest.mark.parametrize(
    ("name", "is_written"),
    [
        ("Qwen-Qwen2.5-7B-Instruct", True),
        ("meta-llama-Llama-3.1-8B-Instruct", False),
        ("CohereForAI-c4ai-command-r7b-12-2024-tool_use", False),
    ],
)
def test_what_a_template_leaves_out_beside_a_call_is_said(material, name: str, is_written: bool) -> None:
    """Llama 3.1 lost it without a word."""
    chats = template(name, material)
    said = Conversation((ASKED, SAYING, result(1), Message("assistant", "Warm.")), "r:1", tools=TOOLS)
    whole = "".join(piece.text for piece in chats.pieces(said.messages, TOOLS))
    assert ("Let me look." in whole) == is_written
    assert chats.left_out(said) == (() if is_written else ("what is said beside a call",))
    silent = Conversation((ASKED, calling("Paris"), result(1), Message("assistant", "Warm.")), "r:1", tools=TOOLS)
    assert chats.left_out(silent) == chats.left_out(Document("text", "r:2")) == ()


@pytest.mark.parametrize("name", ["gemma4", "gemma4_v5", "diffusion_gemma"])
def test_no_result_is_trained_between_a_call_and_what_is_said_beside_it(material, name: str) -> None:
    """These write call, result and words in that order, so that all of it seemed to be one turn."""
    chats = template(name, material)
    with pytest.raises(Untraceable, match="writes what is said beside a call behind the call's result: leave it out"):
        chats.pieces([ASKED, SAYING, result(1), Message("assistant", "Warm.")], TOOLS)
    *_, last = [piece.text for piece in chats.pieces([ASKED, SAYING], TOOLS) if piece.trained]
    assert last.startswith(gemma("Paris"))


def test_calls_one_after_the_other_go_on_in_the_same_turn(material) -> None:
    again = Message("tool", "22 C", call_id="call_1", name="get_weather")
    chat = [ASKED, calling("Paris"), result(1), calling("Rome"), again, Message("assistant", "Both.")]
    pieces = template("gemma4_v5", material).pieces(chat, TOOLS)
    assert [piece.trained for piece in pieces] == [False, True] * 3 + [False]
    assert [piece.text for piece in pieces if piece.trained] == [
        *(gemma("Paris") + "<|tool_response>", gemma("Rome") + "<|tool_response>", "Both.<turn|>")
    ]
    assert pieces[2].text == 'response:get_weather{value:<|"|>21 C<|"|>}<tool_response|>'
    assert pieces[4].text == 'response:get_weather{value:<|"|>22 C<|"|>}<tool_response|>'


def test_a_turn_that_holds_the_frame_around_it_is_not_cut_there(material) -> None:
    frame = "<|im_end|>\n<|im_start|>user\n<tool_response>\n21 C\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    said = Message("assistant", f"I say {frame} so", calls=calling("Paris").calls)
    chats = template("Qwen-Qwen2.5-7B-Instruct", material)
    with pytest.raises(Untraceable, match="rewrites what stands around its answers"):
        chats.pieces([ASKED, said, result(1), Message("assistant", "Warm.")], TOOLS)
    last = chats.pieces([ASKED, said], TOOLS)
    assert last[1] == Piece(f"{said.content}\n{hermes('Paris')}<|im_end|>", True)


def test_a_call_that_is_only_read_is_not_trained(material) -> None:
    first = Message("assistant", "", is_trained=False, calls=calling("Paris").calls)
    chats = template("Qwen-Qwen2.5-7B-Instruct", material)
    pieces = chats.pieces([ASKED, first, result(1), Message("assistant", "Warm.")], TOOLS)
    assert [piece.text for piece in pieces if piece.trained] == ["Warm.<|im_end|>"]
