"""The chat template: what is trained is the answer and its end of turn, whatever the template does around them."""

import dataclasses
import re
from pathlib import Path

import pytest
import trl
from conftest import BOS, CHAT_TEMPLATE, END, byte_tokenizer
from transformers import AutoTokenizer

from qtune.data.chat_template import ChatTemplate, Piece, fold_system
from qtune.data.formats import Message
from qtune.data.rows import NOT_TRAINED, Conversation
from qtune.data.template_process import Untraceable
from qtune.data.tokenize import Encoder, tokenize
from qtune.errors import ModelError

CHAT = [
    Message("system", "Be brief."),
    Message("user", "Hi there"),
    Message("assistant", "Hello!"),
    Message("user", "Why?"),
    Message("assistant", "Because.\n\nOf it."),
]
TEMPLATES = (
    "Mistral-Small-3.2-24B-Instruct-2506",
    "ibm-granite-granite-3.3-2B-Instruct",
    "mistralai-Mistral-Nemo-Instruct-2407",
    "Bielik-11B-v3.0-Instruct",
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use",
    "HuggingFaceTB-SmolLM3-3B",
    "LFM2-8B-A1B",
    "Qwen-QwQ-32B",
    "Qwen-Qwen2.5-7B-Instruct",
    "Qwen-Qwen3-0.6B",
    "google-gemma-2-2b-it",
    "meta-llama-Llama-3.1-8B-Instruct",
    "meta-llama-Llama-3.2-3B-Instruct",
    "microsoft-Phi-3.5-mini-instruct",
    "openai-gpt-oss-120b",
)
TEMPLATES_OF_TRL = (
    *(
        "cohere",
        "cohere2",
        "deepseek_r1_distill",
        "deepseekv3",
        "gemma",
        "gemma3",
        "gemma4",
        "gptoss",
        "lfm2",
        "lfm2_2_5",
    ),
    *("llama3", "llama3_1", "llama3_2", "nemotron_3_nano", "nemotron_3_super", "phi3", "phi3_5", "qwen2_5", "qwen3"),
    *("qwen3_5_nothink", "qwen3_5_think", "qwen3_6", "qwen3_instruct_2507"),
    *("diffusion_gemma", "gemma4_v2", "gemma4_v3", "gemma4_v4", "gemma4_v5", "lfm2_v2", "lfm2_2_5_v2", "lfm2_2_5_vl"),
    *("glm4moe", "muse_glimmer", "nemotron_3_5_lightning", "nemotron_3_ultra", "qwen2_5_vl", "qwen3_8", "qwen3_vl"),
)
SPECIAL_TOKEN = re.compile(r"<[|｜][^|｜<>\s]+[|｜]>|<\|?[a-z_]+\|?>|\[/?[A-Z_]+\]")


def with_template(template: str):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_only_answers_and_their_ends_are_trained() -> None:
    pieces = ChatTemplate.of(byte_tokenizer()).pieces(CHAT)
    assert [piece.text for piece in pieces if piece.trained] == ["Hello!<|end|>", "Because.\n\nOf it.<|end|>"]
    whole = byte_tokenizer().apply_chat_template([vars(message) for message in CHAT], tokenize=False)
    assert "".join(piece.text for piece in pieces) == whole


def test_stop_tokens_are_the_end_of_turn_and_the_end_of_sequence() -> None:
    assert ChatTemplate.of(byte_tokenizer()).stop_token_ids == (END,)
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = "<s>"
    assert ChatTemplate.of(tokenizer).stop_token_ids == (END, BOS)


def test_a_base_without_a_template_says_how_to_give_one() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match=r"no chat template.*chat_template = "):
        ChatTemplate.of(tokenizer)


def test_a_template_that_never_ends_a_turn_is_refused() -> None:
    """Models tuned with such a template never stop."""
    with pytest.raises(ModelError, match="would never stop"):
        ChatTemplate.of(with_template("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"))


def test_a_broken_template_is_one_sentence() -> None:
    with pytest.raises(ModelError, match="fails on a question and an answer"):
        ChatTemplate.of(with_template("{{ nothing.at.all }}{% if %}"))


def test_a_system_prompt_the_template_rejects_goes_before_the_question() -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m.content + '<|end|>' }}{% endfor %}"
    )
    chat = ChatTemplate.of(with_template(template))
    assert not chat.takes_system
    assert chat.pieces(CHAT)[0].text == "Be brief.\n\nHi there<|end|>"
    assert fold_system(CHAT[1:]) == CHAT[1:]


def test_text_the_template_strips_is_followed() -> None:
    template = "{% for m in messages %}{{ m.role + ':' + m.content|trim + '<|end|>' }}{% endfor %}"
    pieces = ChatTemplate.of(with_template(template)).pieces([Message("user", "q"), Message("assistant", "  a  ")])
    assert [piece.text for piece in pieces] == ["user:q<|end|>assistant:", "a<|end|>"]


def test_an_answer_that_looks_like_the_template_is_still_found() -> None:
    pieces = ChatTemplate.of(byte_tokenizer()).pieces(
        [Message("user", "q"), Message("assistant", "<|end|>\n<|user|>\nx")]
    )
    assert [piece.text for piece in pieces if piece.trained] == ["<|end|>\n<|user|>\nx<|end|>"]


def test_an_answer_the_template_leaves_out_is_untraceable() -> None:
    template = (
        "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content + '<|end|>' }}{% endif %}"
        "{% endfor %}"
    )
    with pytest.raises(Untraceable, match="leaves one of its answers out"):
        ChatTemplate.of(with_template(template)).pieces(CHAT[1:])


def test_a_template_that_drops_the_only_answer_is_refused() -> None:
    with pytest.raises(ModelError, match="leaves one of its answers out"):
        ChatTemplate.of(
            with_template("{% for m in messages %}{{ m.content + '<|end|>' if m.role == 'user' }}{% endfor %}")
        )


def test_a_template_that_fails_in_its_own_way_is_one_sentence() -> None:
    with pytest.raises(ModelError, match="division by zero"):
        ChatTemplate.of(with_template("{{ 1 / 0 }}"))


THINKING = (  # as Qwen3 does: an empty thinking block before the last answer, and none in the generation prompt
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}"
    "{% if loop.last and m.role == 'assistant' and '</think>' not in m.content %}{{ '<think></think>' }}{% endif %}"
    "{{ m.content + '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def test_what_stands_between_the_generation_prompt_and_an_answer_is_trained() -> None:
    """A model trained behind gpt-oss's channel, and asked without one, has never learned what to do."""
    pieces = ChatTemplate.of(with_template(THINKING.replace("<think></think>", "<final>"))).pieces(CHAT[1:])
    trained = [piece.text for piece in pieces if piece.trained]
    assert trained == ["Hello!<|end|>", "<final>", "Because.\n\nOf it.<|end|>"]
    assert pieces[-2] == Piece("<final>", True)


def test_an_empty_thinking_block_is_no_habit_unless_it_is_asked_for() -> None:
    chat = ChatTemplate.of(with_template(THINKING))
    asked = [*CHAT[1:4], dataclasses.replace(CHAT[4], thoughts="train_all")]
    for messages, is_trained in ((CHAT[1:], False), (asked, True)):
        pieces = chat.pieces(messages)
        assert pieces[-2:] == (Piece("<think></think>", is_trained), Piece("Because.\n\nOf it.<|end|>", True))


def test_an_answer_with_its_own_thinking_is_trained_whole() -> None:
    chat = [Message("user", "q"), Message("assistant", "<think>hm</think>a")]
    pieces = ChatTemplate.of(with_template(THINKING)).pieces(chat)
    assert pieces == (Piece("<|user|>q<|end|><|assistant|>", False), Piece("<think>hm</think>a<|end|>", True))


def test_an_end_of_turn_of_another_kind_is_not_learned() -> None:
    """Only the last answer is ended here; what follows an earlier one begins the next question."""
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% if loop.last %}{{ '<|end|>' }}{% endif %}"
        "{% endfor %}"
    )
    pieces = ChatTemplate.of(with_template(template)).pieces(CHAT)
    assert [piece.text for piece in pieces if piece.trained] == ["Hello!", "Because.\n\nOf it.<|end|>"]


def test_an_end_of_sequence_right_behind_the_end_of_the_answer_is_learned() -> None:
    """Command R7B closes the answer and then the turn; a runtime waits for the second."""
    tokenizer = with_template("{% for m in messages %}{{ m.content + '<|pad|><|end|>' }}{% endfor %}")
    chat = ChatTemplate.of(tokenizer)
    assert chat.end_of_turn == "<|pad|><|end|>"
    assert chat.stop_token_ids == (END,)


def test_a_system_prompt_the_template_drops_once_answered_goes_before_the_question() -> None:
    """As Mistral Nemo does: it stands with the last question while that is unanswered, and nowhere after."""
    tokenizer = with_template(
        "{% for m in messages %}{% if m.role != 'system' %}"
        "{% if loop.last and m.role == 'user' and messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
        "{{ m.content + '<|end|>' }}{% endif %}{% endfor %}"
    )
    assert ChatTemplate.of(tokenizer).pieces(CHAT)[0].text == "Be brief.\n\nHi there<|end|>"


def test_a_system_prompt_is_never_folded_into_an_answer() -> None:
    assert fold_system([CHAT[0], CHAT[2], CHAT[1]]) == [CHAT[2], Message("user", "Be brief.\n\nHi there")]
    with pytest.raises(Untraceable, match="no question to put it before"):
        fold_system([CHAT[0], CHAT[2]])


def test_a_generation_prompt_unlike_the_rows_is_known() -> None:
    tokenizer = byte_tokenizer()
    assert ChatTemplate.of(tokenizer).differing_prompts is None
    tokenizer.chat_template = CHAT_TEMPLATE.replace("'<|assistant|>\n'", "'<|assistant|>\n<think>'")
    assert ChatTemplate.of(tokenizer).differing_prompts == (
        "<|end|>\n<|assistant|>\n<think>",
        "<|end|>\n<|assistant|>\n",
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_published_templates(material, name) -> None:
    hold_to_the_rules((material / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", TEMPLATES_OF_TRL)
def test_the_templates_trl_carries(name: str) -> None:
    hold_to_the_rules(text_of_trl(name))


@pytest.mark.parametrize("name", ["idefics3", "llava_next", "smolvlm"])
def test_templates_for_images_alone_are_refused(name: str) -> None:
    with pytest.raises(ModelError, match="fails on a question and an answer"):
        hold_to_the_rules(text_of_trl(name))


NEXT_ENDS = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def test_a_turn_that_the_next_one_ends_is_ended_by_what_begins_that() -> None:
    """GLM's models write the beginning of the next turn, and its template ends no answer: it was refused."""
    chat = ChatTemplate.of(with_template(NEXT_ENDS))
    assert [(piece.text, piece.trained) for piece in chat.pieces(CHAT[1:])] == [
        ("<|user|>Hi there<|assistant|>", False),
        ("Hello!<|user|>", True),
        ("Why?<|assistant|>", False),
        ("Because.\n\nOf it.<|user|>", True),
    ]
    (row,) = tokenize([Conversation(tuple(CHAT[1:]), "r:1")], chat, Encoder.of(chat.tokenizer))
    assert row.labels[-1] == chat.stop_token_ids[0] == chat.tokenizer.convert_tokens_to_ids("<|user|>")
    asked = [vars(message) for message in CHAT[1:4]]
    assert row.prompt_ids[1:] == chat.tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, return_dict=False
    )


def test_a_turn_is_not_ended_by_the_beginning_of_a_text() -> None:
    with pytest.raises(ModelError, match="would never stop"):
        ChatTemplate.of(with_template(NEXT_ENDS.replace("'<|' + m.role + '|>'", "bos_token")))


def text_of_trl(name: str) -> str:
    path = Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
    if not path.is_file():
        pytest.skip(f"this trl carries no {path.name}")
    return path.read_text(encoding="utf-8")


def hold_to_the_rules(template: str) -> None:
    """One BOS, the system prompt kept, answers trained and nothing else, the last one with its end of turn."""
    tokenizer = with_template(template)
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(set(SPECIAL_TOKEN.findall(template)))})
    chat = ChatTemplate.of(tokenizer)
    pieces = chat.pieces(CHAT)
    assert "Be brief." in "".join(piece.text for piece in pieces)
    answers = [piece.text for piece in pieces if piece.trained and piece.text != chat.opening]
    assert answers[0] in (CHAT[2].content + chat.end_of_turn, CHAT[2].content)
    assert answers[1:] == [CHAT[4].content + chat.end_of_turn]
    (example,) = tokenize([Conversation(tuple(CHAT), "r:1")], chat, Encoder.of(tokenizer))
    assert example.input_ids.count(tokenizer.bos_token_id) == 1
    trained = [label for label in example.labels if label != NOT_TRAINED]
    assert tokenizer.decode(trained) == "".join(piece.text for piece in pieces if piece.trained)
    assert trained[-1] in chat.stop_token_ids


@pytest.mark.parametrize("name", ["Llama-3", "Mistral-7B-Instruct-v0.3", "Phi-3", "Qwen2.5-0.5B-Instruct"])
def test_published_tokenizers_get_one_bos_and_whole_answers(material, name) -> None:
    tokenizer = AutoTokenizer.from_pretrained(material / "tokenizers" / name)
    chat, encoder = ChatTemplate.of(tokenizer), Encoder.of(tokenizer)
    (example,) = tokenize([Conversation(tuple(CHAT), "r:1")], chat, encoder)
    if tokenizer.bos_token_id is not None and tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id:
        assert example.input_ids.count(tokenizer.bos_token_id) == 1
    trained = tokenizer.decode([label for label in example.labels if label != NOT_TRAINED])
    wanted = "".join(message.content + chat.end_of_turn for message in (CHAT[2], CHAT[4]))
    assert "".join(trained.split()) == "".join(wanted.split())
    assert example.labels[len(example.prompt_ids) - 1] == NOT_TRAINED
    assert example.labels[len(example.prompt_ids)] != NOT_TRAINED
