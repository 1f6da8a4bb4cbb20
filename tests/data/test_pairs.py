"""Pairs of answers in every shape they come in, from a row to a pack; and every way a pair can be wrong."""

import json
from pathlib import Path

import pytest
from conftest import byte_tokenizer

from qtune.audit.audit import audit
from qtune.audit.row_preview import show_row
from qtune.data.packing import packed_rows, seq_lengths
from qtune.data.prepare import prepare
from qtune.data.rows import NOT_TRAINED, Conversation, Dropped, RawRow, as_learned, parse_row, recognise
from qtune.errors import DataError
from qtune.recipe.schema import Columns, Data, Model, Recipe, Train

PLAIN: dict[str, str] = {}
ASKED = {"role": "user", "content": "q"}
BETTER, WORSE = ({"role": "assistant", "content": text} for text in ("good", "bad"))
SHAREGPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "good"}, {"from": "gpt", "value": "bad"}
HH = "\n\nHuman: q\n\nAssistant: one\n\nHuman: and?\n\nAssistant: "


def parsed(values: dict, mapped: dict[str, str] = PLAIN, **data: str) -> Conversation | Dropped:
    row = RawRow(values, "r:1")
    form = recognise("auto", [row], mapped, in_pairs=True)
    item = as_learned(parse_row(row, form, mapped, None), Data(train="rows.jsonl", **data))
    assert isinstance(item, Conversation | Dropped)
    return item


def said(item: Conversation | Dropped) -> tuple[str, str]:
    """Both conversations, a letter for each role, `*` behind what is learned."""
    assert isinstance(item, Conversation), item
    both = (item.messages, item.rejected)
    return tuple(  # type: ignore[return-value]
        " ".join(f"{m.role[0]}:{m.content}{'*' * (m.is_trained and m.role == 'assistant')}" for m in messages)
        for messages in both
    )


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"question": "q", "chosen": "good", "rejected": "bad"},
        {"prompt": [ASKED], "chosen": [BETTER], "rejected": [WORSE]},
        {"chosen": [ASKED, BETTER], "rejected": [ASKED, WORSE]},
        {"prompt": "q", "prompt_id": "x", "chosen": [ASKED, BETTER], "rejected": [ASKED, WORSE]},
        {"prompt": "q", "messages": [ASKED, BETTER], "chosen": [ASKED, BETTER], "rejected": [ASKED, WORSE]},
        {"conversations": [SHAREGPT[0]], "chosen": SHAREGPT[1], "rejected": SHAREGPT[2]},
        {"messages": [ASKED], "chosen": "good", "rejected": "bad"},
        {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"},
        {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " good", "rejected": " bad"},
    ],
)
def test_every_shape_is_the_same_pair(values: dict) -> None:
    item = parsed(values)
    assert [text.replace(" ", "") for text in said(item)] == ["u:qa:good*", "u:qa:bad*"]
    assert item.unused == (("prompt_id",) if "prompt_id" in values else ())


def test_what_both_say_before_they_differ_is_read_only() -> None:
    chosen, rejected = said(parsed({"chosen": f"{HH}good", "rejected": f"{HH}bad\n\nHuman: why?\n\nAssistant: so"}))
    assert chosen == "u:q a:one u:and? a:good*"
    assert rejected == "u:q a:one u:and? a:bad* u:why? a:so*"


def test_the_system_prompt_input_and_mapped_columns_are_read() -> None:
    values = {"instruction": "q", "input": "x", "system": "s", "better": "good", "worse": "bad"}
    assert said(parsed(values, {"chosen": "better", "rejected": "worse"})) == (
        "s:s u:q\n\nx a:good*",
        "s:s u:q\n\nx a:bad*",
    )


def test_tools_are_shown_and_calls_are_preferred() -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    item = parsed({"prompt": [ASKED], "chosen": [call], "rejected": [WORSE], "tools": tools})
    assert isinstance(item, Conversation)
    assert (item.messages[-1].calls[0].name, bool(item.tools)) == ("add", True)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
        ({"prompt": "q", "chosen": "a", "rejected": None}, "rejected: the answer is null"),
        ({"prompt": "q", "chosen": "", "rejected": "b"}, "chosen: the answer is empty"),
        ({"prompt": None, "chosen": "a", "rejected": "b"}, "chosen: there is no prompt"),
        ({"prompt": "q", "chosen": 3, "rejected": "b"}, "chosen: the answer is a number"),
        ({"prompt": "q", "chosen": [], "rejected": "b"}, "chosen: the list of messages is empty"),
        ({"prompt": [ASKED], "chosen": [BETTER], "rejected": [3]}, "rejected: message 2 is a number"),
        ({"chosen": [ASKED, BETTER], "rejected": [ASKED]}, "rejected: the last message is the user's"),
        ({"messages": "q", "chosen": "a", "rejected": "b"}, "chosen: the messages are text, not a list"),
        (
            {"chosen": [ASKED, BETTER], "rejected": [{"role": "user", "content": "p"}, WORSE]},
            "differ from message 1 on, which is the user's and the user's: both must answer the same question",
        ),
        ({"prompt": "q", "chosen": "\ud800", "rejected": "b"}, "half a character"),
        ({"prompt": "q", "chosen": "a", "rejected": "\ud800"}, "half a character"),
    ],
)
def test_a_pair_that_is_none_says_why(values: dict, reason: str) -> None:
    item = parsed(values)
    assert isinstance(item, Dropped)
    assert reason in item.reason


def test_a_row_without_rejected_says_so() -> None:
    form = recognise("auto", [RawRow({"prompt": "q", "chosen": "a", "rejected": "b"}, "r:1")], PLAIN, in_pairs=True)
    item = parse_row(RawRow({"prompt": "q", "chosen": "a"}, "r:2"), form, PLAIN, None)
    assert isinstance(item, Dropped)
    assert item.reason == "has no column for the rejected"


def test_answers_that_differ_in_thoughts_alone_are_none_without_them() -> None:
    values = {"prompt": "q", "chosen": "<think>b</think>a", "rejected": "<think>c</think>a"}
    item = parsed(values, thoughts="drop")
    assert isinstance(item, Dropped)
    assert item.reason == "chosen and rejected are the same without their thoughts"


def test_each_objective_refuses_the_rows_of_the_other() -> None:
    row, pair = {"prompt": "q", "completion": "a"}, {"prompt": "q", "chosen": "a", "rejected": "b"}
    with pytest.raises(DataError, match=r"prompt, completion hold no pairs, which train\.objective asks for"):
        recognise("auto", [RawRow(row, "r:1")], PLAIN, in_pairs=True)
    with pytest.raises(DataError, match=r'pairs of answers, which train\.objective = "dpo" or "orpo" learns from'):
        recognise("auto", [RawRow(pair, "r:1")], PLAIN)


def recipe(folder: Path, rows: list[dict], **data: object) -> Recipe:
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train = Train(objective="dpo")
    settings = {"train": str(folder / "rows.jsonl"), "max_tokens": 96, "held_out_fraction": 0.2, **data}
    return Recipe(name="t", model=Model(base="demo"), data=Data(**settings), train=train)


def pairs(count: int) -> list[dict]:
    return [
        {"prompt": f"number {i}", "chosen": f"good {i}" * (1 + i % 3), "rejected": f"bad {i}"} for i in range(count)
    ]


def test_a_pair_is_one_row_and_two_documents_of_one_pack(tmp_path: Path) -> None:
    prepared = prepare(recipe(tmp_path, pairs(20)), byte_tokenizer())
    assert (len(prepared.train), len(prepared.held_out), prepared.report.rows_read) == (16, 4, 20)
    rows = packed_rows(prepared.train, prepared.train_packs)
    decode = byte_tokenizer().decode
    for pack, numbers, lengths in zip(rows, prepared.train_packs, seq_lengths(rows), strict=True):
        assert pack["seq_lengths"] == list(lengths)
        assert len(lengths) == 2 * len(numbers)
        assert len(pack["input_ids"]) == sum(lengths) <= 96
        at = 0
        for place, length in enumerate(lengths):
            ids, labels = (pack[name][at : at + length] for name in ("input_ids", "labels"))
            trained = decode([token for token, label in zip(ids, labels, strict=True) if label != NOT_TRAINED])
            assert trained.startswith("bad" if place % 2 else "good")
            assert decode(ids).startswith("<s>")
            at += length


def test_the_answer_that_is_asked_for_is_the_chosen_one(tmp_path: Path) -> None:
    example = prepare(recipe(tmp_path, pairs(20)), byte_tokenizer()).held_out[0]
    assert example.answer.startswith("good")
    assert example.prompt_ids == example.input_ids[: len(example.prompt_ids)]
    assert 0 < len(example.prompt_ids) < example.rejected_at < len(example.input_ids)


def test_pairs_are_the_same_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QTUNE_CACHE", str(tmp_path / "cache"))
    made, kept = (prepare(recipe(tmp_path, pairs(9)), byte_tokenizer()) for _ in range(2))
    assert "from the cache" in kept.report.notices[-1]
    assert list(kept.train) == list(made.train)
    assert kept.train[0].rejected_at == made.train[0].rejected_at > 0


def test_a_pair_that_is_too_long_with_both_of_its_answers_is_left_out(tmp_path: Path) -> None:
    rows = [*pairs(5), {"prompt": "q", "chosen": "a" * 40, "rejected": "b" * 40}]
    report = prepare(recipe(tmp_path, rows), byte_tokenizer()).report
    assert [(each.reason, each.rows) for each in report.dropped] == [
        ("is longer than data.max_tokens = 96 with both of its answers", 1)
    ]


def test_data_check_and_show_read_pairs(tmp_path: Path) -> None:
    rows = [*pairs(5), {"prompt": "q", "chosen": "a", "rejected": "a"}]
    data = recipe(tmp_path, rows).data
    found = audit(data, byte_tokenizer(), lambda *told: None, in_pairs=True)
    assert (found.sources[0].format, found.sources[0].usable_rows) == ("preferences", 5)
    assert [each.place for each in found.groups.by_code["no-preference"].places] == ["rows.jsonl:6"]
    shown = show_row(data, "2", False, byte_tokenizer(), in_pairs=True)
    assert [stretch.text for stretch in shown.stretches if stretch.is_trained] == [
        "good 1good 1<|end|>",
        "bad 1<|end|>",
    ]


def test_data_with_mapped_columns_are_prepared(tmp_path: Path) -> None:
    rows = [{"ask": f"n {i}", "up": "yes", "down": "no"} for i in range(4)]
    columns = Columns(prompt="ask", chosen="up", rejected="down")
    assert prepare(recipe(tmp_path, rows, columns=columns), byte_tokenizer()).report.format == "preferences"
