"""Ids and labels, against what a person would write down."""

import dataclasses

import pytest
from conftest import BOS, END, byte_tokenizer
from transformers import AutoTokenizer

from qtune.data.chat_template import ChatTemplate
from qtune.data.formats import Message, RowFault
from qtune.data.rows import NOT_TRAINED, Conversation, Document, Dropped, Example
from qtune.data.tokenize import BATCH_CHARACTERS, BATCH_TEXTS, Encoder, batches_of, fit, tokenize

TOKENIZER = byte_tokenizer()
CHAT = Conversation((Message("user", "hi"), Message("assistant", "yes")), "r:1")


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def run(item: Conversation | Document) -> Example | Dropped:
    (result,) = tokenize([item], ChatTemplate.of(TOKENIZER), Encoder.of(TOKENIZER))
    return result


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
    for start in ([], [BOS], [BOS] * 2, [BOS] * 3):
        assert encoder.with_one_bos([*start, 9, 9]) == [BOS, 9, 9]
    assert run(CHAT).input_ids.count(BOS) == 1
    assert run(Document("hi", "r:1")).input_ids.count(BOS) == 1


def test_a_document_is_trained_from_its_first_word_to_its_end() -> None:
    example = run(Document("hi", "r:1"))
    assert example.input_ids == [BOS, *ids("hi"), END]
    assert example.labels == example.input_ids
    assert example.trained_tokens == 3
    assert example.prompt_ids == []


def test_long_rows_are_dropped_or_cut() -> None:
    whole = run(CHAT)
    length = len(whole.input_ids)
    assert fit(whole, length, is_cut=False) is whole
    assert fit(whole, length - 1, is_cut=False) == Dropped(
        "r:1", RowFault.TOO_LONG, f"is longer than data.max_tokens = {length - 1}"
    )
    cut = fit(whole, length - 3, is_cut=True)
    assert cut.input_ids == whole.input_ids[:-3]
    assert cut.cut_tokens == 2  # the newline that went first was not trained
    assert fit(whole, len(whole.prompt_ids), is_cut=True) == Dropped(
        "r:1", RowFault.NOTHING_TO_TRAIN, "has nothing to train once cut"
    )


def test_what_the_template_rejects_is_a_dropped_row_among_the_others() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TOKENIZER.chat_template.replace(
        "{{ bos_token }}", "{% if messages|length > 2 %}{{ raise_exception('too long') }}{% endif %}"
    )
    long = Conversation((*CHAT.messages, *CHAT.messages), "r:2")
    results = tokenize([CHAT, long, CHAT], ChatTemplate.of(tokenizer), Encoder.of(tokenizer))
    assert results[0] == results[2] == run(CHAT)
    assert results[1] == Dropped("r:2", RowFault.TEMPLATE_REFUSES, "the chat template rejects it (too long)")


def test_what_is_asked_is_what_was_trained() -> None:
    """The last answer's prompt takes part in the row as it stands, behind every earlier turn."""
    chat = Conversation((*CHAT.messages, Message("user", "so?"), Message("assistant", "no")), "r:1")
    example = run(chat)
    assert example.input_ids[: len(example.prompt_ids)] == example.prompt_ids
    assert TOKENIZER.decode(example.prompt_ids).endswith("so?<|end|>\n<|assistant|>\n")
    assert (example.prompt_text, example.answer) == ("so?", "no")


@pytest.mark.parametrize("text", ["naïve ☃", " leading", "trailing ", "a\n\nb", "\t", "<|user|>"])
def test_pieces_are_cut_without_loss(text) -> None:
    (row,) = Encoder.of(TOKENIZER).rows([["<|user|>", text, text]])
    assert [TOKENIZER.decode(part) for part in row] == ["<|user|>", text, text]


def test_rows_keep_their_order_over_batches() -> None:
    items = [
        Conversation((Message("user", str(i)), Message("assistant", "a" * (i % 9 + 1))), f"r:{i}") for i in range(900)
    ]
    results = tokenize(items, ChatTemplate.of(TOKENIZER), Encoder.of(TOKENIZER))
    assert [(example.place, example.prompt_text, example.trained_tokens) for example in results] == [
        (f"r:{i}", str(i), i % 9 + 2) for i in range(900)
    ]


def test_a_batch_ends_with_so_many_texts_or_characters() -> None:
    """The tokenizer holds a hundred bytes a token of a batch: a thousand books at once are more than a machine has."""
    assert [len(batch) for batch in batches_of(range(2 * BATCH_TEXTS + 1), lambda item: 1)] == [BATCH_TEXTS] * 2 + [1]
    half = BATCH_CHARACTERS // 2
    assert list(batches_of([half, half, 9 * half, 1], lambda item: item)) == [[half, half], [9 * half], [1]]


def test_white_space_behind_a_special_token_is_what_it_is_in_the_whole_row(material) -> None:
    """Phi-3's special tokens take the white space behind them; pieces tokenised on their own kept it."""
    tokenizer = AutoTokenizer.from_pretrained(material / "tokenizers" / "Phi-3")
    messages = (
        Message("user", "Hi"),
        Message("assistant", "Hello"),
        Message("user", "Why?"),
        Message("assistant", "So."),
    )
    template = ChatTemplate.of(tokenizer)
    (example,) = tokenize([Conversation(messages, "r:1")], template, Encoder.of(tokenizer))
    whole = "".join(piece.text for piece in template.pieces(messages))
    assert example.input_ids == tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_an_answer_of_weight_0_has_its_tokens_and_no_label() -> None:
    """The row is the same to the token; of the answer, its opening and its end nothing is learned."""
    turns = (*CHAT.messages, Message("user", "so?"), Message("assistant", "no"))
    whole = run(Conversation(turns, "r:1"))
    for silent in (1, 3):
        weighed = tuple(
            dataclasses.replace(turn, is_trained=False) if at == silent else turn for at, turn in enumerate(turns)
        )
        row = run(Conversation(weighed, "r:1"))
        assert row.input_ids == whole.input_ids
        learned = TOKENIZER.decode([token for token in row.labels if token != NOT_TRAINED])
        assert learned == {1: "no<|end|>", 3: "yes<|end|>"}[silent]
        asked = {1: ("so?", "no"), 3: ("hi", "yes")}[silent]
        assert (row.prompt_text, row.answer) == asked
        assert TOKENIZER.decode(row.prompt_ids).endswith(f"{asked[0]}<|end|>\n<|assistant|>\n")
