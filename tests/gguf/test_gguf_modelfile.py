"""A Go template that writes what the chat template writes, for published templates of the supported families."""

from collections.abc import Sequence

import go_template
import pytest
from made_bases import byte_level
from transformers import PreTrainedTokenizerFast

from qtune.data.chat_template import ChatTemplate, fold_system
from qtune.data.formats import Message
from qtune.errors import ModelError
from qtune.gguf.modelfile import Frame, modelfile
from qtune.gguf.tokenizer_check import without_bos
from qtune.recipe.chat_templates import BUILT_IN

# By file name: whether the tokenizer adds a BOS, and the BOS and end of turn its template knows.
PUBLISHED = {
    "Qwen-Qwen2.5-7B-Instruct": (False, "<|endoftext|>", "<|im_end|>"),
    "Qwen-Qwen3-0.6B": (False, "<|endoftext|>", "<|im_end|>"),
    "meta-llama-Llama-3.1-8B-Instruct": (True, "<|begin_of_text|>", "<|eot_id|>"),
    "meta-llama-Llama-3.2-3B-Instruct": (True, "<|begin_of_text|>", "<|eot_id|>"),
}
SYSTEM = Message("system", 'Answer "briefly",\nplease.')
TALK = [
    Message("user", "What is {{ it }}?"),
    Message("assistant", "A \\ thing."),
    Message("user", "And für Käse 🧀?"),
    Message("assistant", "Yes.\n\nVery."),
    Message("user", "Why?"),
    Message("assistant", "So."),
    Message("user", "Oh"),
]


def tokenizer_with(template: str, bos: str = "<s>", eos: str = "<|end|>") -> PreTrainedTokenizerFast:
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"bos_token": bos, "eos_token": eos})
    tokenizer.chat_template = template
    return tokenizer


def by_go(frame: Frame, messages: Sequence[Message]) -> str:
    return go_template.render(frame.go_template(), [{"Role": m.role, "Content": m.content} for m in messages])


def by_jinja(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], adds_bos: bool) -> str:
    messages = messages if ChatTemplate.of(tokenizer).takes_system else fold_system(messages)
    turns = [{"role": m.role, "content": m.content} for m in messages]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return without_bos(tokenizer, text) if adds_bos else text


def check(tokenizer: PreTrainedTokenizerFast, adds_bos: bool) -> None:
    frame = Frame.of(tokenizer, adds_bos)
    for turns in (1, 3, 5, 7):
        for messages in (TALK[:turns], [SYSTEM, *TALK[:turns]]):
            expected = by_jinja(tokenizer, messages, adds_bos)
            assert by_go(frame, messages) == expected
            assert frame.render(messages) == expected


def test_the_tests_own_template() -> None:
    check(byte_level(), adds_bos=True)
    check(byte_level(), adds_bos=False)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_templates(material, name) -> None:
    adds_bos, bos, eos = PUBLISHED[name]
    text = (material / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    check(tokenizer_with(text, bos, eos), adds_bos)


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("bos", ["<s>", "<|im_start|>"])
def test_qtunes_own_templates(name: str, bos: str) -> None:
    tokens = BUILT_IN[name].tokens
    for adds_bos in (True, False):
        tokenizer = tokenizer_with(BUILT_IN[name].text, bos, tokens[-1] if tokens else "<|end|>")
        tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
        check(tokenizer, adds_bos)


def test_a_template_without_a_system_role_gets_it_as_training_does() -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
        "{% else %}{{ raise_exception('no system') }}{% endif %}{% endfor %}"
    )
    check(tokenizer_with(template), adds_bos=True)


def test_an_answer_that_is_begun_is_gone_on_with() -> None:
    frame = Frame.of(byte_level(), adds_bos=True)
    text = by_go(frame, [TALK[0], Message("assistant", "It is")])
    assert text.endswith("<|assistant|>\nIt is")


@pytest.mark.parametrize(
    "condition",
    ["loop.last", "loop.index0 == 2"],
    ids=["the last question is written otherwise", "the second question is"],
)
def test_what_a_modelfile_cannot_say_is_refused(condition) -> None:
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' and " + condition + " %}{{ '!' }}{% endif %}"
        "{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    with pytest.raises(ModelError, match=r"a Modelfile cannot say\. Use --to gguf"):
        Frame.of(tokenizer_with(template), adds_bos=False)


def test_the_modelfile() -> None:
    text = modelfile(Frame.of(byte_level(), adds_bos=True), "model.gguf", ["<|end|>", '"'])
    first, *_, stop, quoted = text.splitlines()
    assert first == "FROM ./model.gguf"
    assert (stop, quoted) == ('PARAMETER stop "<|end|>"', 'PARAMETER stop "\\""')
    assert text.count('"""') == 2
