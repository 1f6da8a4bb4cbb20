"""Ids and labels, against what a person would write down."""

import pytest
from conftest import byte_tokenizer

from qtune.data.formats import Conversation, Document, Message
from qtune.data.rows import Dropped
from qtune.data.template import ChatTemplate
from qtune.data.tokens import NOT_TRAINED, Encoder, Example, tokenize

TOKENIZER = byte_tokenizer()
CHAT = Conversation((Message("user", "hi"), Message("assistant", "yes")), "r:1")


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def run(item: Conversation | Document, max_tokens: int = 100, on_long: str = "drop") -> Example | Dropped:
    return tokenize(item, ChatTemplate.of(TOKENIZER), Encoder.of(TOKENIZER), max_tokens, on_long)


def test_a_conversation() -> None:
    example = run(CHAT)
    prompt, answer = ids("<s><|user|>\nhi<|end|>\n<|assistant|>\n"), ids("yes<|end|>")
    assert example.input_ids == [*prompt, *answer, *ids("\n")]
    assert example.labels == [NOT_TRAINED] * len(prompt) + answer + [NOT_TRAINED]
    assert example.prompt_ids == prompt
    assert (example.prompt_text, example.answer) == ("hi", "yes")
    assert example.trained_tokens == len("yes") + 1


def test_there_is_one_bos_whoever_wrote_it() -> None:
    encoder = Encoder.of(TOKENIZER)
    for start in ([], [0], [0, 0], [0, 0, 0]):
        assert encoder.with_one_bos([*start, 9, 9]) == [0, 9, 9]
    assert run(CHAT).input_ids.count(0) == 1
    assert run(Document("hi", "r:1")).input_ids.count(0) == 1


def test_a_document_is_trained_from_its_first_word_to_its_end() -> None:
    example = run(Document("hi", "r:1"))
    assert example.input_ids == [0, *ids("hi"), 1]
    assert example.labels == example.input_ids
    assert example.trained_tokens == 3
    assert example.prompt_ids == []


def test_long_rows_are_dropped_cut_or_named() -> None:
    whole = run(CHAT)
    length = len(whole.input_ids)
    assert isinstance(run(CHAT, length), Example)
    assert run(CHAT, length - 1) == Dropped("r:1", f"is longer than data.max_tokens = {length - 1}")
    cut = run(CHAT, length - 3, "truncate")
    assert cut.input_ids == whole.input_ids[:-3]
    assert cut.cut_tokens == 2  # the newline that went first was not trained
    assert run(CHAT, len(whole.prompt_ids), "truncate") == Dropped("r:1", "has nothing to train once cut")


@pytest.mark.parametrize("text", ["naïve ☃", " leading", "trailing ", "a\n\nb", "\t", "<|user|>"])
def test_pieces_are_cut_without_loss(text) -> None:
    assert TOKENIZER.decode(Encoder.of(TOKENIZER).pieces([text])[0]) == text
