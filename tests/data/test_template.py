"""The chat template: what is trained is the answer and its end of turn, whatever the template does around them."""

import re

import pytest
from conftest import byte_tokenizer
from transformers import AutoTokenizer

from qtune.data.formats import Message
from qtune.data.template import ChatTemplate, Untraceable, fold_system
from qtune.data.tokens import Encoder
from qtune.errors import ModelError

CHAT = [
    Message("system", "Be brief."),
    Message("user", "Hi there"),
    Message("assistant", "Hello!"),
    Message("user", "Why?"),
    Message("assistant", "Because.\n\nOf it."),
]
TEMPLATES = (
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
    assert ChatTemplate.of(byte_tokenizer()).stop_token_ids == (1,)
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = "<s>"
    assert ChatTemplate.of(tokenizer).stop_token_ids == (1, 0)


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


@pytest.mark.parametrize("name", TEMPLATES)
def test_published_templates(material, name) -> None:
    template = (material / "chat_templates" / f"{name}.jinja").read_text()
    tokenizer = with_template(template)
    markers = sorted(set(re.findall(r"<\|[A-Za-z_]+\|>|<end_of_turn>|<start_of_turn>", template)))
    tokenizer.add_special_tokens({"additional_special_tokens": markers})
    chat = ChatTemplate.of(tokenizer)
    trained = [piece.text for piece in chat.pieces(CHAT) if piece.trained]
    assert len(trained) == 2
    for text, message in zip(trained, (CHAT[2], CHAT[4]), strict=True):
        assert text.startswith(message.content)
        ending = text.removeprefix(message.content)
        assert tokenizer(ending, add_special_tokens=False)["input_ids"][-1] in tokenizer.all_special_ids


@pytest.mark.parametrize("name", ["Llama-3", "Mistral-7B-Instruct-v0.3", "Phi-3", "Qwen2.5-0.5B-Instruct"])
def test_published_tokenizers_get_one_bos_and_whole_answers(material, name) -> None:
    tokenizer = AutoTokenizer.from_pretrained(material / "tokenizers" / name)
    chat, encoder = ChatTemplate.of(tokenizer), Encoder.of(tokenizer)
    pieces = chat.pieces(CHAT)
    encoded = encoder.pieces([piece.text for piece in pieces])
    first = encoder.with_one_bos(encoded[0])
    if tokenizer.bos_token_id is not None and tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id:
        assert first.count(tokenizer.bos_token_id) == 1
    for piece, ids in zip(pieces, encoded, strict=True):
        assert "".join(tokenizer.decode(ids).split()) == "".join(piece.text.split())
    ends = [ids[-1] for piece, ids in zip(pieces, encoded, strict=True) if piece.trained]
    assert set(ends) <= set(chat.stop_token_ids)
