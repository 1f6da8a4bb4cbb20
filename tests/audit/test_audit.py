"""One pass over files with a fault of each kind: all are found, each at its line, and nothing else is."""

import json
from pathlib import Path

import pytest
from conftest import byte_tokenizer
from made_faults import GOOD_LINES, LINES, MAX_TOKENS, chat, good, write_faulty

from qtune.audit.audit import Audit, audit
from qtune.recipe.schema import Data

PLAIN = '{"question": "q", "answer": "a"}\n'
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('not in turn') }}{% endif %}"
    "{{ m.content + '<|end|>' }}{% endfor %}"
)


def audited(train: Path, template: str | None = None, **settings: object) -> Audit:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    return audit(Data(train=str(train), **settings), tokenizer, lambda what, done, total: None)


def places(found: Audit) -> dict[str, list[str]]:
    return {code: [place.place for place in group.places] for code, group in found.groups.by_code.items()}


def written(folder: Path, *lines: str, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(line.rstrip("\n") + "\n" for line in lines), encoding="utf-8")
    return path


def test_one_of_each_fault_is_found_at_its_line_and_nothing_else(tmp_path: Path) -> None:
    write_faulty(tmp_path)
    found = audited(tmp_path / "faulty.jsonl", held_out=str(tmp_path / "held_out.jsonl"), max_tokens=MAX_TOKENS)
    expected = {code: [f"faulty.jsonl:{line}"] for code, line in LINES.items()}
    assert places(found) == {**expected, "overlap": ["held_out.jsonl:1"]}
    train, held_out = found.sources
    bad = ("unreadable-row", "missing-answer", "empty-text", "unknown-role", "tool-call", "wrong-shape")
    assert (train.format, train.rows) == ("messages", max(LINES.values()))
    assert train.usable_rows == train.rows - len(bad) - found.groups.rows("half-character")
    assert (held_out.rows, held_out.usable_rows, held_out.is_held_out) == (2, 2, True)


def test_the_places_of_repeats_say_what_they_repeat(tmp_path: Path) -> None:
    found = audited(written(tmp_path, good(1), good(2), good(1)))
    (repeat,) = found.groups.by_code["duplicate"].places
    assert repeat.told == "is rows.jsonl:1"


def test_nothing_of_a_secret_is_kept(tmp_path: Path) -> None:
    row = chat(("user", "cafÃ© \ufffd AKIAIOSFODNN7EXAMPLE"), ("assistant", "joe@acme.co"))
    kept = repr(audited(written(tmp_path, row)).groups)
    for secret in ("AKIA", "joe", "cafÃ"):
        assert secret not in kept
    assert "an AWS key" in kept


def test_a_template_that_refuses_is_grouped_and_the_rest_goes_on(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        chat(("user", "one"), ("user", "two"), ("assistant", "three")),
        chat(("system", "be kind"), ("user", "four"), ("assistant", "five")),
        good(1),
    )
    found = audited(path, template=NO_SYSTEM)
    assert places(found) == {"template-refuses": ["rows.jsonl:1"], "system-moved": ["rows.jsonl:2"]}
    assert "not in turn" in found.groups.by_code["template-refuses"].places[0].told
    assert found.sources[0].usable_rows == 2


@pytest.mark.parametrize(("on_long", "lost"), [("drop", 101), ("error", 101), ("truncate", 45)])
def test_what_a_long_row_loses(tmp_path: Path, on_long: str, lost: int) -> None:
    """8 tokens up to the answer, 101 trained with the end of turn, a line feed; 56 of the trained lie within 64."""
    row = chat(("user", "q"), ("assistant", "x" * 100))
    tokens = audited(written(tmp_path, row), max_tokens=64, on_long=on_long).tokens
    assert tokens is not None
    assert (tokens.tokens, tokens.trained_tokens, tokens.long_rows) == (110, 101, 1)
    assert tokens.lost_trained_tokens == lost


def test_lengths_and_the_longest_by_place(tmp_path: Path) -> None:
    path = written(tmp_path, *(json.dumps({"text": "x" * size}) for size in (5, 50, 20, 30)))
    tokens = audited(path).tokens
    assert tokens is not None
    assert [(row.place, row.tokens) for row in tokens.longest] == [
        ("rows.jsonl:2", 52),
        ("rows.jsonl:4", 32),
        ("rows.jsonl:3", 22),
    ]
    assert (tokens.rows, tokens.tokens, sum(bar.rows for bar in tokens.bars)) == (4, 113, 4)


def test_columns_that_no_format_fits_are_a_fault_of_the_file(tmp_path: Path) -> None:
    found = audited(written(tmp_path, '{"ask": "q", "reply": "a"}', "null"))
    assert places(found) == {"unknown-columns": ["rows.jsonl:1"], "unreadable-row": ["rows.jsonl:2"]}
    assert (found.sources[0].rows, found.sources[0].format, found.tokens) == (2, "", None)


def test_a_column_that_the_first_row_lacks_is_found_further_down(tmp_path: Path) -> None:
    path = written(tmp_path, PLAIN, '{"question": "p", "answer": "b", "rule": "be brief"}')
    found = audited(path, columns={"system": "rule"})
    assert (found.sources[0].format, found.sources[0].usable_rows) == ("question-answer", 2)


@pytest.mark.parametrize(
    ("name", "content", "place", "told"),
    [
        ("rows.tsv", b"PK\x03\x04....", "rows.tsv", "Excel"),
        ("rows.csv", b'question,answer\nq,a\n"open,a\n', "rows.csv:3", "not readable as CSV"),
        ("rows.jsonl", b'[\n{"question": "q"},\n', "rows.jsonl", "over several lines"),
        ("rows.json", b'[{"question": "q"}', "rows.json:1", "not JSON"),
        ("rows.jsonl", b"", "rows.jsonl", "empty"),
        ("rows.txt.gz", b"\x1f\x8b..", "rows.txt.gz", "no whole"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_finding(
    tmp_path: Path, name: str, content: bytes, place: str, told: str
) -> None:
    (tmp_path / name).write_bytes(content)
    (fault,) = audited(tmp_path / name).groups.by_code["unreadable-file"].places
    assert fault.place == place
    assert told in fault.told
    assert str(tmp_path) not in fault.told


def test_a_bad_held_out_file_does_not_hide_the_training_rows(tmp_path: Path) -> None:
    found = audited(written(tmp_path, PLAIN, "null"), held_out=str(tmp_path / "gone.jsonl"))
    assert places(found) == {"unreadable-row": ["rows.jsonl:2"], "unreadable-file": ["gone.jsonl"]}


def test_near_rows_across_the_split_are_told_apart(tmp_path: Path) -> None:
    train = written(tmp_path, good(3), good(2))
    held_out = written(tmp_path, good(3, end="!"), good(9), good(9), name="held_out.jsonl")
    found = audited(train, held_out=str(held_out))
    assert places(found) == {"near-overlap": ["held_out.jsonl:1"], "duplicate": ["held_out.jsonl:3"]}


def test_progress_is_told_by_line_where_each_line_is_a_row(tmp_path: Path) -> None:
    heard = []
    path = written(tmp_path, *[PLAIN] * 30)
    audit(Data(train=str(path)), byte_tokenizer(), lambda *told: heard.append(told))
    assert heard == [("checking", 30, 30), ("comparing", 30, None)]


def test_good_rows_are_fine(tmp_path: Path) -> None:
    found = audited(written(tmp_path, *(good(number) for number in range(1, GOOD_LINES + 1))))
    assert found.groups.by_code == {}
    assert found.stops is not None


def test_what_the_template_leaves_out_beside_a_call_is_counted(tmp_path: Path) -> None:
    calls_alone = (
        "{{ tools }}{% for m in messages %}{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}"
        "{% else %}{{ m.content }}{% endif %}{{ '<|end|>' }}{% endfor %}"
    )
    call = {"role": "assistant", "content": "I look.", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    talk = [
        {"role": "user", "content": "q"},
        call,
        {"role": "tool", "content": "r"},
        {"role": "assistant", "content": "a"},
    ]
    rows = [{"messages": talk, "tools": [{"name": "f", "parameters": {"type": "object", "properties": {}}}]}]
    rows.append({**rows[0], "messages": [talk[0], {**call, "content": ""}, *talk[2:]]})
    (left_out,) = audited(written(tmp_path, *map(json.dumps, rows)), calls_alone).unused
    assert (left_out.field, left_out.rows) == ("what is said beside a call", 1)
    assert left_out.advice == "The chat template leaves it out: the call is learned without it."
