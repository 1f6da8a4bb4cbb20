"""One raw row, read as each format; and every way a row can be wrong."""

import pytest
from read_rows import read_rows

from qtune.data.formats import FORMATS, RowFault
from qtune.data.rows import Conversation, Document, Dropped, RawRow, parse_row, recognise
from qtune.errors import DataError

PLAIN: dict[str, str] = {}
SYSTEM, USER, ASSISTANT = "system", "user", "assistant"


def turns(values: dict, system: str | None = None, mapped: dict[str, str] = PLAIN) -> tuple[tuple[str, str], ...]:
    item = parse_row(RawRow(values, "r:1"), recognise("auto", [RawRow(values, "r:1")], mapped), mapped, system)
    assert isinstance(item, Conversation), item
    return tuple((message.role, message.content) for message in item.messages)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"prompt": "q", "completion": "a"}, ((USER, "q"), (ASSISTANT, "a"))),
        ({"question": "q", "answer": "a", "source": "x"}, ((USER, "q"), (ASSISTANT, "a"))),
        ({"query": "q", "response": "a", "system": ""}, ((USER, "q"), (ASSISTANT, "a"))),
        ({"instruction": "q", "input": "x", "output": "a"}, ((USER, "q\n\nx"), (ASSISTANT, "a"))),
        (
            {"instruction": "q", "input": "", "output": "a", "system": "s", "history": [["p", "b"]]},
            ((SYSTEM, "s"), (USER, "p"), (ASSISTANT, "b"), (USER, "q"), (ASSISTANT, "a")),
        ),
        (
            {
                "messages": [
                    {"role": USER, "content": "q"},
                    {"role": ASSISTANT, "content": [{"type": "text", "text": "a"}]},
                ]
            },
            ((USER, "q"), (ASSISTANT, "a")),
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "human", "value": "q"},
                    {"from": "gpt", "value": "a"},
                ]
            },
            ((SYSTEM, "s"), (USER, "q"), (ASSISTANT, "a")),
        ),
        (
            {
                "messages": [
                    {"role": SYSTEM, "content": ""},
                    {"role": USER, "content": "q"},
                    {"role": ASSISTANT, "content": "a"},
                ]
            },
            ((USER, "q"), (ASSISTANT, "a")),
        ),
        (
            {"system": "s", "conversation": [{"human": "q", "assistant": "a"}]},
            ((SYSTEM, "s"), (USER, "q"), (ASSISTANT, "a")),
        ),
    ],
)
def test_every_format_is_recognised(values, expected) -> None:
    assert turns(values) == expected


@pytest.mark.parametrize(
    ("values", "mapped", "expected"),
    [
        ({"Prompt": "q", "Completion": "a"}, PLAIN, ((USER, "q"), (ASSISTANT, "a"))),
        ({" QUESTION ": "q", "Answer": "a", "Id": 1}, PLAIN, ((USER, "q"), (ASSISTANT, "a"))),
        ({"Instruction": "q", "Input": "x", "Output": "a", "System": "s"}, PLAIN, None),
        ({"Prompt": "no", "prompt": "q", "Completion": "a"}, PLAIN, ((USER, "q"), (ASSISTANT, "a"))),
        ({"Prompt": "q", "Completion": "a", "System": "x"}, {"check": "System"}, ((USER, "q"), (ASSISTANT, "a"))),
    ],
)
def test_names_of_columns_may_have_capitals(values, mapped, expected) -> None:
    """A CSV file's `Prompt` was no prompt. A column spelled as here comes first, and one that is mapped is taken."""
    assert turns(values, mapped=mapped) == (expected or ((SYSTEM, "s"), (USER, "q\n\nx"), (ASSISTANT, "a")))


def test_plain_text_is_a_document() -> None:
    assert parse_row(RawRow({"text": "t"}, "r:1"), FORMATS["text"], PLAIN, None) == Document("t", "r:1")


def test_columns_can_be_mapped() -> None:
    mapped = {"prompt": "QUESTION", "completion": "final_decision", "input": "CONTEXT"}
    values = {"QUESTION": "q", "CONTEXT": ["c", "d"], "final_decision": "yes"}
    assert turns(values, mapped=mapped) == ((USER, "q\n\nc\n\nd"), (ASSISTANT, "yes"))


def test_the_recipes_system_prompt_stands_where_a_row_has_none() -> None:
    assert turns({"prompt": "q", "completion": "a"}, system="s")[0] == (SYSTEM, "s")
    assert turns({"prompt": "q", "completion": "a", "system": "own"}, system="s")[0] == (SYSTEM, "own")
    chat = {
        "messages": [
            {"role": SYSTEM, "content": "own"},
            {"role": USER, "content": "q"},
            {"role": ASSISTANT, "content": "a"},
        ]
    }
    assert [turn for turn in turns(chat, system="s") if turn[0] == SYSTEM] == [(SYSTEM, "own")]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"question": "q", "answer": None}, "the answer is null"),
        ({"question": "q", "answer": "  "}, "the answer is empty"),
        ({"question": "q", "answer": 3.5}, "the answer is a number, not text"),
        ({"question": None, "answer": "a"}, "the prompt is null"),
        ({"messages": []}, "the list of messages is empty"),
        ({"messages": "hello"}, "the messages are text, not a list"),
        ({"messages": ["hello"]}, "message 1 is text, not an object"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "the role 'bot', which does not exist"),
        ({"messages": [{"role": USER, "content": "x"}]}, "the last message is the user's"),
        ({"messages": [{"role": USER, "content": None}]}, "the content of message 1 is null"),
        ({"messages": [{"role": USER, "content": [{"type": "image"}]}]}, "a part that is no text"),
        ({"messages": [{"role": ["x"], "content": "y"}]}, "which does not exist"),
        ({"messages": [{"content": "x"}]}, "message 1 has no role"),
        ({"messages": [{"role": "system", "content": ""}]}, "there is no answer to learn"),
        (
            {"messages": [{"role": ASSISTANT, "content": "x", "tool_calls": [{"id": 1}]}]},
            "a call in message 1 has no name",
        ),
        ({"instruction": "q", "output": "a", "history": "x"}, "the history is not a list"),
        ({"instruction": "q", "output": "a", "history": [["x", None]]}, "the history is not a list"),
        ({"instruction": "q", "output": "a", "input": 5}, "the input is a number, not text"),
        ({"instruction": "q", "output": "a", "system": 5}, "the system prompt is a number, not text"),
        ({"question": "q", "answer": "\ud83d"}, "half a character (\\ud83d)"),
    ],
)
def test_a_bad_row_says_why(values, reason) -> None:
    item = parse_row(RawRow(values, "r:7"), recognise("auto", [RawRow(values, "r:1")], PLAIN), PLAIN, None)
    assert isinstance(item, Dropped)
    assert item.place == "r:7"
    assert reason in item.reason


def test_what_an_answer_is_checked_by_is_whole_characters_of_a_column_with_a_name() -> None:
    """A column with no header was taken for it."""
    row = RawRow({"question": "q", "answer": "a", "": "b", "tests": "\ud83d"}, "r:1")
    plain = parse_row(row, FORMATS["question-answer"], PLAIN, None)
    assert isinstance(plain, Conversation)
    assert plain.check == ""
    mapped = parse_row(row, FORMATS["question-answer"], {"check": "tests"}, None)
    assert isinstance(mapped, Dropped)
    assert mapped.fault is RowFault.HALF_CHARACTER


def test_a_row_without_the_columns_of_the_first_says_so() -> None:
    assert parse_row(RawRow({"x": "1"}, "r:2"), FORMATS["alpaca"], PLAIN, None) == Dropped(
        "r:2", RowFault.MISSING_ANSWER, "has no column for the prompt and the completion"
    )


def test_unknown_columns_list_what_would_work() -> None:
    with pytest.raises(DataError, match=r"no format fits the columns a, b: .*alpaca needs instruction and output.*"):
        recognise("auto", [RawRow({"a": 1, "b": 2}, "r:1")], PLAIN)


def test_a_named_format_that_does_not_fit_says_what_it_needs() -> None:
    with pytest.raises(DataError, match=r'data\.format = "alpaca" does not fit the columns question, answer: alpaca'):
        recognise("alpaca", [RawRow({"question": "q", "answer": "a"}, "r:1")], PLAIN)


def test_a_mapped_column_no_row_has_names_the_nearest() -> None:
    rows = [RawRow({"ask": "q", "reply": "a"}, "r:1")]
    with pytest.raises(DataError, match=r'data\.columns\.completion = "replay": .* Did you mean reply\?'):
        recognise("auto", rows, {"prompt": "ask", "completion": "replay"})
    with pytest.raises(DataError, match="The columns are ask, reply"):
        recognise("auto", rows, {"prompt": "xyz"})


def test_a_mapping_chooses_the_format() -> None:
    values = {"messages": [], "ask": "q", "reply": "a"}
    assert turns(values, mapped={"prompt": "ask", "completion": "reply"}) == ((USER, "q"), (ASSISTANT, "a"))


@pytest.mark.parametrize(
    ("value", "kept"),
    [("assert f(1) == 2", "assert f(1) == 2"), (["a", "b"], "a\nb"), ({"k": ["é"]}, '{"k": ["é"]}'), (None, "")],
)
def test_the_check_of_a_row_is_kept_and_not_told_to_the_model(value: object, kept: str) -> None:
    row, mapped = RawRow({"prompt": "q", "completion": "a", "tests": value}, "r:1"), {"check": "tests"}
    item = parse_row(row, recognise("auto", [row], mapped), mapped, None)
    assert isinstance(item, Conversation)
    assert (item.check, [message.content for message in item.messages]) == (kept, ["q", "a"])


def test_rows_to_train_on_need_no_check() -> None:
    row, mapped = RawRow({"question": "q", "answer": "a"}, "r:1"), {"check": "tests"}
    item = parse_row(row, recognise("auto", [row], mapped), mapped, None)
    assert isinstance(item, Conversation)
    assert item.check == ""


def test_a_mapped_column_is_read_once() -> None:
    """Mapping alpaca's input to the prompt asked every question twice, as prompt and as the input under it."""
    values = {"instruction": "Answer truthfully", "input": "q", "output": "a"}
    assert turns(values, mapped={"prompt": "input", "completion": "output"}) == ((USER, "q"), (ASSISTANT, "a"))


def test_one_odd_row_does_not_choose_the_format() -> None:
    good, odd = RawRow({"question": "q", "answer": "a"}, "r:1"), RawRow({"messages": []}, "r:2")
    assert recognise("auto", [good, odd], PLAIN).name == "question-answer"
    assert recognise("auto", [RawRow({"note": "x"}, "r:0"), good], PLAIN).name == "question-answer"


READABLE = (
    "alpaca.csv",
    "alpaca.jsonl",
    "alpaca_en_demo.json",
    "c4.parquet",
    "c4_demo.jsonl",
    "chatml.jsonl",
    "conversations.jsonl",
    "glaive_toolcall_en_demo.json",
    "identity.json",
    "sharegpt.jsonl",
    "swift_single.csv",
    "v1_sft_demo.jsonl",
    "wiki_demo.txt",
)


@pytest.mark.parametrize("name", READABLE)
def test_files_of_other_tools_are_read_whole(material, name) -> None:
    rows = read_rows(str(material / "datasets" / "formats" / name)).rows
    form = recognise("auto", rows, PLAIN)
    assert not [item for row in rows if isinstance(item := parse_row(row, form, PLAIN, None), Dropped)]


def conversation(values: dict, mapped: dict[str, str] = PLAIN) -> Conversation:
    row = RawRow(values, "r:1")
    item = parse_row(row, recognise("auto", [row], mapped), mapped, None)
    assert isinstance(item, Conversation), item
    return item


def test_an_answer_of_weight_0_is_read_and_not_learned() -> None:
    """OpenAI's own field; such answers were trained on."""
    messages = [
        {"role": USER, "content": "p"},
        {"role": ASSISTANT, "content": "bad", "weight": 0},
        {"role": USER, "content": "q"},
        {"role": ASSISTANT, "content": "good", "weight": 1.0},
        {"role": USER, "content": "r"},
        {"role": ASSISTANT, "content": "also", "weight": None},
    ]
    item = conversation({"messages": messages})
    assert [m.is_trained for m in item.messages if m.role == ASSISTANT] == [False, True, True]
    assert item.unused == ()
    assert item.last_trained == 5
    messages[5]["weight"] = 0
    assert conversation({"messages": messages}).last_trained == 3


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (0.5, "the weight of message 2 is 0.5; 0 reads an answer only, and 1 trains it"),
        ("1", "the weight of message 2 is text"),
        (True, "the weight of message 2 is true or false"),
        (0, "every answer has the weight 0, so there is no answer to learn"),
    ],
)
def test_a_weight_that_is_not_known_says_what_works(weight: object, reason: str) -> None:
    turn = {"role": ASSISTANT, "content": "a", "weight": weight}
    item = parse_row(
        RawRow({"messages": [{"role": USER, "content": "q"}, turn]}, "r:1"), FORMATS["messages"], PLAIN, None
    )
    assert isinstance(item, Dropped)
    assert reason in item.reason


@pytest.mark.parametrize(
    ("values", "unused"),
    [
        ({"question": "q", "answer": "a"}, ()),
        ({"question": "q", "answer": "a", "thinking": "hm", "id": 3, "note": "", "tags": []}, ("id",)),
        ({"question": "q", "answer": "a", "input": "lost"}, ("input",)),
        ({"instruction": "q", "response": "a", "context": "c", "category": "x"}, ("category",)),
        ({"prompt": "q", "chosen": "a", "completion": "a", "rejected": "b"}, ("chosen", "rejected")),
        ({"text": "t", "url": "u"}, ("url",)),
        (
            {
                "messages": [
                    {"role": SYSTEM, "content": "s", "name": "x"},
                    {"role": USER, "content": [{"type": "text", "text": "q", "cache_control": {"type": "x"}}]},
                    {"role": ASSISTANT, "content": "a", "reasoning_content": "hm", "tool_calls": None},
                ],
                "tools": [{"name": "f"}],
                "system": "another",
            },
            ("name", "cache_control", "system"),
        ),
        (
            {"conversations": [{"from": "human", "value": "q", "weight": 1}, {"from": "gpt", "value": "a"}]},
            ("weight of a question",),
        ),
        ({"conversation": [{"human": "q", "assistant": "a", "thinking": "hm"}]}, ("thinking",)),
    ],
)
def test_what_nobody_reads_is_named(values: dict, unused: tuple[str, ...]) -> None:
    """`reasoning_content`, `thinking` and `tools` vanished without a word."""
    row = RawRow(values, "r:1")
    item = parse_row(row, recognise("auto", [row], PLAIN), PLAIN, None)
    assert not isinstance(item, Dropped), item
    assert item.unused == unused


def test_mapped_columns_are_read() -> None:
    mapped = {"prompt": "ask me", "completion": "reply", "input": "notes", "check": "tests"}
    values = {"ask me": "q", "reply": "a", "notes": "n", "tests": "assert 1", "more": 1}
    assert conversation(values, mapped).unused == ("more",)


@pytest.mark.parametrize(
    ("values", "mapped", "name"),
    [
        ({"Frage": "q", "Antwort": "a"}, {"prompt": "Frage", "completion": "Antwort"}, "prompt-completion"),
        (
            {"Frage": "q", "Antwort": "a", "system": "s"},
            {"prompt": "Frage", "completion": "Antwort"},
            "prompt-completion",
        ),
        ({"instruction": "q", "Antwort": "a"}, {"completion": "Antwort"}, "alpaca"),
        ({"a": "q", "b": "a", "input": "c"}, {"prompt": "a", "completion": "b"}, "alpaca"),
        ({"ask": "q", "answer": "a"}, PLAIN, "question-answer"),
        ({"instruction": "q", "response": "a", "context": "c"}, PLAIN, "alpaca"),
        ({"chat": []}, {"messages": "chat"}, "messages"),
    ],
)
def test_a_format_goes_by_its_own_names(values: dict, mapped: dict[str, str], name: str) -> None:
    """Two mapped columns were called alpaca."""
    assert recognise("auto", [RawRow(values, "r:1")], mapped).name == name


def test_dolly_has_its_context_under_the_instruction() -> None:
    values = {"instruction": "q", "context": "c", "response": "a", "category": "x"}
    assert turns(values) == ((USER, "q\n\nc"), (ASSISTANT, "a"))


@pytest.mark.parametrize(
    ("values", "mapping"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, {"completion": "chosen"}),
        ({"question": "q", "chosen": "a", "rejected": "b"}, {"completion": "chosen"}),
        ({"topic": "q", "chosen": "a", "rejected": "b"}, {"completion": "chosen", "prompt": "topic"}),
        ({"prompt": "q", "chosen": [{}], "rejected": [{}]}, {"messages": "chosen"}),
    ],
)
def test_preferences_are_called_so_and_the_mapping_that_is_named_works(values: dict, mapping: dict[str, str]) -> None:
    with pytest.raises(
        DataError, match=r'these are pairs of answers, which train\.objective = "dpo" or "orpo" learns from'
    ) as fault:
        recognise("auto", [RawRow(values, "r:1")], PLAIN)
    written = ", ".join(f'{field} = "{column}"' for field, column in mapping.items())
    assert str(fault.value).endswith(f"[data] columns = {{ {written} }}.")
    assert recognise("auto", [RawRow(values, "r:1")], mapping)
