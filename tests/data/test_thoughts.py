"""Thoughts: told from the answer, trained, only read or left out, and an empty block no habit."""

import dataclasses

import pytest
from conftest import byte_tokenizer
from test_call_masks import ASKED, TOOLS, calling, result, template

from qtune.audit.row_preview import show_row
from qtune.data.chat_template import ChatTemplate
from qtune.data.formats import FORMATS, Message
from qtune.data.formats.thoughts import parted
from qtune.data.rows import NOT_TRAINED, Conversation, Dropped, RawRow, as_learned, parse_row
from qtune.data.tokenize import Encoder, tokenize
from qtune.recipe.schema import Data

TWO_TURNS = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "First.", "reasoning_content": "hm one"},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "Second.", "reasoning_content": "hm two"},
]


def learned(turns: list[dict], **settings: str) -> Conversation | Dropped:
    data = Data(train="x", **settings)
    item = as_learned(parse_row(RawRow({"messages": turns}, "r:1"), FORMATS["messages"], {}, None), data)
    assert not isinstance(item, str)
    return item


def trained(name: str, material, turns: list[dict], **settings: str) -> tuple[str, list[str]]:
    """The whole row, and what of it is trained."""
    item = learned(turns, **settings)
    assert isinstance(item, Conversation), item
    pieces = template(name, material).pieces(item.messages)
    return "".join(piece.text for piece in pieces), [piece.text for piece in pieces if piece.trained]


@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        ("<think>\nhm\n</think>\n\na", "hm", "a"),
        ("  <thinking>hm</thinking> a", "hm", "a"),
        ("hm\n</think>\n\na", "hm", "a"),
        ("<think>hm", "hm", ""),
        ("<think>\n\n</think>\n\na", "", "a"),
        ("a <think> of b </think>", "", "a <think> of b </think>"),
        ("plain", "", "plain"),
    ],
)
def test_a_thought_is_told_from_the_answer(text: str, thought: str, answer: str) -> None:
    assert parted(text) == (thought, answer)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_in_a_field_of_their_own_are_read(key: str) -> None:
    item = learned([TWO_TURNS[0], {"role": "assistant", "content": "a", key: "hm"}])
    assert isinstance(item, Conversation)
    assert (item.messages[1].thought, item.messages[1].content, item.unused) == ("hm", "a", ())


def test_thoughts_in_parts_and_in_a_column_are_read() -> None:
    parts = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a"}]
    item = learned([TWO_TURNS[0], {"role": "assistant", "content": parts}])
    row = RawRow({"question": "q", "answer": "a", "thinking": "hm"}, "r:1")
    other = parse_row(row, FORMATS["question-answer"], {}, None)
    for each in (item, other):
        assert isinstance(each, Conversation)
        assert (each.messages[-1].thought, each.messages[-1].content, each.unused) == ("hm", "a", ())


# The template's own rule: Qwen3 leaves thoughts of earlier turns out, and opens none in the generation prompt; Qwen3.5
# opens one; gpt-oss has a channel; Llama's knows no thoughts, so they stand in the content, in every turn.
@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("Qwen-Qwen3-0.6B", ["First.<|im_end|>", "<think>\nhm two\n</think>\n\n", "Second.<|im_end|>"]),
        ("qwen3_6", ["First.<|im_end|>", "hm two\n</think>\n\n", "Second.<|im_end|>"]),
        ("gemma4_v5", ["First.<turn|>", "<|channel>thought\nhm two\n<channel|>", "Second.<turn|>"]),
        (
            "gptoss",
            [
                "<|channel|>final<|message|>First.",
                "<|channel|>analysis<|message|>hm two<|end|>",
                "<|start|>assistant<|channel|>final<|message|>Second.<|return|>",
            ],
        ),
        *(
            (name, ["<think>\nhm one\n</think>\n\n", f"First.{end}", "<think>\nhm two\n</think>\n\n", f"Second.{end}"])
            for name, end in (("chatml", "<|im_end|>"), ("alpaca", "<|end|>"), ("plain", "<|end|>"))
        ),
        (
            "meta-llama-Llama-3.1-8B-Instruct",
            [
                *("<think>\nhm one\n</think>\n\n", "First.<|eot_id|>"),
                *("<think>\nhm two\n</think>\n\n", "Second.<|eot_id|>"),
            ],
        ),
    ],
)
def test_thoughts_are_trained_or_only_read_by_the_templates_own_rule(material, name: str, wanted: list[str]) -> None:
    whole, pieces = trained(name, material, TWO_TURNS)
    assert pieces == wanted
    shown, read = trained(name, material, TWO_TURNS, thoughts="show")
    assert shown == whole
    assert read == [piece for piece in wanted if "hm" not in piece]
    dropped, rest = trained(name, material, TWO_TURNS, thoughts="drop")
    assert "hm" not in dropped
    assert "".join(rest).count("First.") == "".join(rest).count("Second.") == 1


def test_a_thought_behind_a_result_goes_on_in_the_same_turn(material) -> None:
    looking = dataclasses.replace(calling("Paris"), thought="hm look")
    answer = Message("assistant", "Warm.", thought="hm so")
    pieces = template("gemma4_v5", material).pieces([ASKED, looking, result(1), answer], TOOLS)
    assert [(piece.text, piece.trained, piece.is_thought) for piece in pieces[1:-1]] == [
        ("<|channel>thought\nhm look\n<channel|>", True, True),
        ('<|tool_call>call:get_weather{city:<|"|>Paris<|"|>}<tool_call|><|tool_response>', True, False),
        ('response:get_weather{value:<|"|>21 C<|"|>}<tool_response|>', False, False),
        ("<|channel>thought\nhm so\n<channel|>", True, True),
        ("Warm.<turn|>", True, False),
    ]


def test_a_block_within_the_content_is_shown_and_dropped_as_one_in_a_field(material) -> None:
    inline = [{"role": "user", "content": "Two?"}, {"role": "assistant", "content": "<think>hm two</think>Second."}]
    _, pieces = trained("Qwen-Qwen3-0.6B", material, inline)
    assert pieces == ["<think>\nhm two\n</think>\n\nSecond.<|im_end|>"]
    _, pieces = trained("Qwen-Qwen3-0.6B", material, inline, thoughts="show")
    assert pieces == ["Second.<|im_end|>"]
    whole, _ = trained("Qwen-Qwen3-0.6B", material, inline, thoughts="drop")
    assert "hm" not in whole


@pytest.mark.parametrize("name", ["Qwen-Qwen3-0.6B", "qwen3_5_think", "meta-llama-Llama-3.1-8B-Instruct"])
def test_an_empty_block_is_trained_where_it_is_asked_for_alone(material, name: str) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>\n\n</think>\n\na"}]
    for thoughts in ("train", "show", "drop"):
        whole, pieces = trained(name, material, turns, thoughts=thoughts)
        assert not any("think>" in piece for piece in pieces)
        assert "".join(pieces).startswith("a<|")
    whole, pieces = trained(name, material, turns, thoughts="train_all")
    assert "</think>" in whole
    assert "</think>" in "".join(pieces)


def test_a_thought_before_a_call_is_told_from_the_call(material) -> None:
    call = Message("assistant", "", calls=calling("Paris").calls, thought="hm", thoughts="show")
    answer = Message("assistant", "Warm.")
    pieces = template("Qwen-Qwen3-0.6B", material).pieces([ASKED, call, result(1), answer], TOOLS)
    called = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>'
    assert [piece.text for piece in pieces if piece.trained] == [called, "Warm.<|im_end|>"]
    assert "<think>\nhm\n</think>\n\n" in [piece.text for piece in pieces if piece.is_thought]


def test_a_model_is_asked_before_its_thought(material) -> None:
    """A prompt with the row's own thought in it would ask for less than a server does."""
    chats = template("Qwen-Qwen3-0.6B", material)
    for thoughts in ("train", "show"):
        item = learned(TWO_TURNS, thoughts=thoughts)
        (example,) = tokenize([item], chats, Encoder.of(chats.tokenizer))
        assert chats.tokenizer.decode(example.prompt_ids).endswith("Two?<|im_end|>\n<|im_start|>assistant\n")


def test_an_answer_that_is_a_thought_alone_is_not_used() -> None:
    item = learned([TWO_TURNS[0], {"role": "assistant", "content": "<think>hm</think>"}], thoughts="drop")
    assert isinstance(item, Dropped)
    assert item.reason == "an answer is nothing but a thought"


def test_the_last_answer_alone_is_trained_where_that_is_asked_for() -> None:
    item = learned(TWO_TURNS, train_on="last")
    assert isinstance(item, Conversation)
    assert [message.is_trained for message in item.messages if message.role == "assistant"] == [False, True]
    turns = [*TWO_TURNS[:3], {**TWO_TURNS[3], "weight": 0}]
    item = learned(turns, train_on="last")
    assert [message.is_trained for message in item.messages if message.role == "assistant"] == [True, False]


def test_the_shown_row_tells_thoughts_apart(tmp_path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "one?", "answer": "<think>hm</think>first"}\n')
    row = show_row(Data(train=str(tmp_path / "rows.jsonl")), "1", False, byte_tokenizer())
    assert [(each.text, each.is_trained, each.is_thought) for each in row.stretches][1:3] == [
        ("<think>hm</think>", True, True),
        ("first<|end|>", True, False),
    ]


def test_a_row_without_thoughts_is_as_it_was() -> None:
    chats = ChatTemplate.of(byte_tokenizer())
    item = learned([TWO_TURNS[0], {"role": "assistant", "content": "a"}])
    (example,) = tokenize([item], chats, Encoder.of(chats.tokenizer))
    assert chats.tokenizer.decode([label for label in example.labels if label != NOT_TRAINED]) == "a<|end|>"
