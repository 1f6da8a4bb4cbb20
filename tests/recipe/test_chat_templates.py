"""qtune's own chat templates on real tokenizers: what each writes, what of it is trained, which one is proposed."""

from pathlib import Path
from typing import Any

import pytest
import trl
from conftest import byte_tokenizer
from transformers import AutoTokenizer

from qtune.data.chat_template import ChatTemplate
from qtune.data.formats import Message
from qtune.data.rows import NOT_TRAINED, Conversation
from qtune.data.tokenize import Encoder, tokenize
from qtune.errors import ModelError
from qtune.model.base_files import DEMO_BASE
from qtune.model.tokenizer import load_tokenizer
from qtune.recipe.chat_templates import BUILT_IN, fitting, text_of
from qtune.recipe.schema import Model

SYSTEM = Message("system", "Be brief.")
TALK = [Message("user", "Hi\n"), Message("assistant", "Hello!"), Message("user", "Why?"), Message("assistant", "So.")]
# By hand: a system prompt, two questions and their answers; then the beginning without a system prompt.
WRITTEN = {
    "chatml": (
        "{bos}<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi\n<|im_end|>\n<|im_start|>assistant\n",
        *("Hello!<|im_end|>", "\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n", "So.<|im_end|>", "\n"),
    ),
    "llama3": (
        "{bos}<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "Hello!<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "So.<|eot_id|>",
    ),
    "alpaca": (
        "{bos}Be brief.\n\n### Instruction:\nHi\n\n\n### Response:\n",
        *("Hello!{eos}", "\n\n### Instruction:\nWhy?\n\n### Response:\n", "So.{eos}"),
    ),
    "plain": (
        "{bos}Be brief.\n\nUser:\nHi\n\n\nAssistant:\n",
        *("Hello!{eos}", "\n\nUser:\nWhy?\n\nAssistant:\n", "So.{eos}"),
    ),
}
WITHOUT_SYSTEM = {
    "chatml": "{bos}<|im_start|>user\nHi\n<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "{bos}<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "alpaca": "{bos}Below is an instruction that describes a task. Write a response that appropriately completes the"
    " request.\n\n### Instruction:\nHi\n\n\n### Response:\n",
    "plain": "{bos}User:\nHi\n\n\nAssistant:\n",
}
# By tokenizer: which it has the tokens of, the best first. The last is a base in a folder of its own.
FITTING = {
    "demo": ["alpaca", "plain"],
    "Llama-3": ["llama3", "alpaca", "plain"],
    "Mistral-7B-Instruct-v0.3": ["alpaca", "plain"],
    "Phi-3": ["alpaca", "plain"],
    "Qwen2.5-0.5B-Instruct": ["chatml", "alpaca", "plain"],
    "SmolLM2": ["chatml", "alpaca", "plain"],
}


@pytest.fixture(params=FITTING)
def named(request: pytest.FixtureRequest) -> tuple[str, Any]:
    """A tokenizer without a chat template, by name."""
    name: str = request.param
    if name == "demo":
        tokenizer = AutoTokenizer.from_pretrained(DEMO_BASE)
    elif name == "SmolLM2":  # its BOS is the token that begins a turn
        tokenizer = byte_tokenizer()
        tokenizer.add_special_tokens({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})
    else:
        tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue("material") / "tokenizers" / name)
    tokenizer.chat_template = None
    return name, tokenizer


def as_dicts(messages: list[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def test_answers_and_their_ends_are_trained_and_nothing_else(named: tuple[str, Any]) -> None:
    name, tokenizer = named
    for template in FITTING[name]:
        tokenizer.chat_template = text_of(template)
        bos = "" if (name, template) == ("SmolLM2", "chatml") else tokenizer.bos_token or ""
        first, *whole = [
            text.format(bos=bos, eos=tokenizer.eos_token) for text in (WITHOUT_SYSTEM[template], *WRITTEN[template])
        ]
        chat, encoder = ChatTemplate.of(tokenizer), Encoder.of(tokenizer)
        for messages, wanted in (([SYSTEM, *TALK], whole), (TALK, [first, *whole[1:]])):
            pieces = chat.pieces(messages)
            assert [piece.text for piece in pieces] == wanted
            assert [piece.trained for piece in pieces] == [False, True, False, True, False][: len(wanted)]
            (row,) = tokenize([Conversation(tuple(messages), "r:1")], chat, encoder)
            assert row.prompt_ids == asked(tokenizer, messages[:-1])
            assert row.input_ids == tokenizer.apply_chat_template(as_dicts(messages), return_dict=False)
            trained = [label for label in row.labels if label != NOT_TRAINED]
            assert tokenizer.decode(trained) == whole[1] + whole[3]
            assert trained[-1] == chat.stop_token_ids[0]


def asked(tokenizer: Any, messages: list[Message]) -> list[int]:
    """What a server makes of a conversation that waits for an answer."""
    ids: list[int] = tokenizer.apply_chat_template(as_dicts(messages), add_generation_prompt=True, return_dict=False)
    return ids


def test_a_base_without_a_template_is_given_the_line_of_one_that_needs_no_new_token(named: tuple[str, Any]) -> None:
    name, tokenizer = named
    best = FITTING[name][0]
    with pytest.raises(ModelError, match=rf'no chat template.* \[model\] chat_template = "{best}" needs no new token'):
        ChatTemplate.of(tokenizer)
    for template in set(BUILT_IN) - set(FITTING[name]):  # and so is one that names a template whose tokens are missing
        tokenizer.chat_template = text_of(template)
        with pytest.raises(ModelError, match=rf'would never stop.* \[model\] chat_template = "{best}" needs no new'):
            ChatTemplate.of(tokenizer)


def test_a_tokenizer_without_an_end_fits_none() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    assert fitting([], None) == []
    for template in (None, *map(text_of, BUILT_IN)):
        tokenizer.chat_template = template
        with pytest.raises(ModelError, match=r"a file of yours: the tokenizer has no end of sequence"):
            ChatTemplate.of(tokenizer)


def test_they_write_what_the_published_ones_write(material) -> None:
    """With a system prompt, as Qwen2.5 has one of its own where there is none."""
    published = {
        "chatml": (material / "chat_templates" / "Qwen-Qwen2.5-7B-Instruct.jinja", "Qwen2.5-0.5B-Instruct"),
        "llama3": (Path(trl.__file__).parent / "chat_templates" / "llama3.jinja", "Llama-3"),
    }
    for name, (path, tokenizer_name) in published.items():
        tokenizer = AutoTokenizer.from_pretrained(material / "tokenizers" / tokenizer_name)
        texts = [
            tokenizer.apply_chat_template(
                as_dicts([SYSTEM, *TALK[:turns]]),
                chat_template=template,
                tokenize=False,
                add_generation_prompt=is_asked,
            )
            for template in (text_of(name), path.read_text(encoding="utf-8"))
            for turns, is_asked in ((1, True), (2, False), (3, True), (4, False))
        ]
        assert texts[:4] == texts[4:]


def test_a_recipe_names_one(tmp_path: Path) -> None:
    assert load_tokenizer(Model(base="demo", chat_template="alpaca")).chat_template == BUILT_IN["alpaca"].text
    (tmp_path / "own.jinja").write_text("{{ messages }}")
    assert text_of(str(tmp_path / "own.jinja")) == "{{ messages }}"
    (tmp_path / "own.jinja").write_text(" \n")
    with pytest.raises(ModelError, match=r"model\.chat_template: .*own\.jinja is empty\."):
        text_of(str(tmp_path / "own.jinja"))
