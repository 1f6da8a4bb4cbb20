"""The rows of the code demo are what their script makes, and their tests tell right code from nearly right code."""

import itertools
import json
import random
import re
import sys
from pathlib import Path

import pytest

from qtune.data.rows import Conversation, Example, RawRow, parse_row, recognise
from qtune.evaluate import sandbox
from qtune.evaluate.metrics.code_tests import fault_of
from qtune.recipe.load import load

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import build_code_data  # noqa: E402
import sample_rows  # noqa: E402

linux = pytest.mark.skipif(sys.platform != "linux", reason="answers are run on Linux only")
SOME = slice(None, None, 16)  # each costs three processes
CALL = re.compile(r"shelf\.(\w+)\(\"(\w+)\", (\d+)\)\.(\w+)\((?:\"(\w+)\")?\)")


@pytest.fixture(scope="module")
def made() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    return build_code_data.rows()


def pairings(rows: list[dict[str, str]]) -> set[tuple[str, ...]]:
    """What is called on what, without the numbers."""
    found = [CALL.search(row["answer"]) for row in rows]
    return {(match[1], match[2], match[4], match[5] or "") for match in found if match}


@pytest.mark.parametrize(("number", "name"), [(0, "code_train.jsonl"), (1, "code_held_out.jsonl")])
def test_the_files_are_what_the_script_makes(
    number: int, name: str, made: tuple[list[dict[str, str]], list[dict[str, str]]]
) -> None:
    text = (ROOT / "recipes" / "data" / name).read_text(encoding="utf-8")
    assert [json.loads(line) for line in text.splitlines()] == made[number]
    assert len(text) < 300_000


def test_train_development_and_held_out_rows_share_no_pairing_sentence_or_name(
    made: tuple[list[dict[str, str]], list[dict[str, str]]],
) -> None:
    """The development rows were looked at while choosing, so the held-out ones may not be like them either."""
    files = (made[0], build_code_data.development(), made[1])
    assert [len(pairings(rows)) for rows in files] == [96, 47, 47]
    parts = (build_code_data.TRAIN, build_code_data.DEVELOPMENT, build_code_data.HELD_OUT)
    named = [{re.split(r"\W", row["answer"])[1] for row in rows} for rows in files]
    assert all(found <= set(part.names) for found, part in zip(named, parts, strict=True))
    assert len({len({word for name in found for word in name.split("_")}) for found in named}) == 1
    for (some, part), (others, other) in itertools.combinations(zip(files, parts, strict=True), 2):
        assert not pairings(some) & pairings(others)
        assert not opening_words(part) & opening_words(other)
        assert not set(part.names) & set(other.names)
    assert ["tests" in rows[0] for rows in files] == [False, True, True]


def opening_words(part: build_code_data.Part) -> set[str]:
    return {sentence.split()[0] for sentence in part.nouns + part.orders}


def test_the_development_rows_are_written_only_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_rows, "DATA", tmp_path / "shipped")
    monkeypatch.setattr(sys, "argv", ["build_code_data.py", "--development", str(tmp_path / "mine")])
    build_code_data.main()
    assert [path.name for path in tmp_path.rglob("*.jsonl")] == ["code_development.jsonl"]
    (tmp_path / "shipped").mkdir()
    monkeypatch.setattr(sys, "argv", ["build_code_data.py"])
    build_code_data.main()
    shipped = {path.name for path in (tmp_path / "shipped").iterdir()}
    assert shipped == {"code_train.jsonl", "code_held_out.jsonl"}


def test_every_row_can_be_scored(made: tuple[list[dict[str, str]], list[dict[str, str]]]) -> None:
    for row in made[1]:
        assert fault_of(Example([], [], [], row["question"], row["answer"], "", row["tests"])) is None


def test_a_row_of_the_hub_is_read_with_its_tests() -> None:
    """A row as `educational_instruct` has them, columns and types."""
    asserts = ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]
    columns = {"seq_id": 1, "instruction": "Add two numbers.", "output": "Sure!", "code": "def add(a, b): ..."}
    row = RawRow({**columns, "entry_point": "add", "testcase": asserts}, "hub:1")
    mapped = load(ROOT / "recipes" / "code.toml").data.columns.mapped
    item = parse_row(row, recognise("auto", [row], mapped), mapped, None)
    assert isinstance(item, Conversation)
    assert [message.content for message in item.messages] == [
        "Add two numbers.\n\nassert add(1, 2) == 3\n\nassert add(0, 0) == 0",
        "def add(a, b): ...",
    ]
    assert item.check == "\n".join(asserts)


def test_the_largest_number_can_be_told_from_its_near_misses() -> None:
    """Over 99 there was one book, and its total is the best: the search for books that tell them apart had no end."""
    for task in build_code_data.tasks():
        n = task.numbers[-1]
        shelves = [build_code_data.books(task, n, random.Random(seed)) for seed in range(100)]
        right = [build_code_data.expected(task, n, shelf) for shelf in shelves]
        for wrong in build_code_data.near_misses(task, n):
            assert any(build_code_data.expected(*wrong, s) != r for s, r in zip(shelves, right, strict=True)), wrong


@linux
def test_references_pass_and_code_that_is_nearly_right_does_not(
    made: tuple[list[dict[str, str]], list[dict[str, str]]],
) -> None:
    others = {"over": "under", "under": "over", "most": "least", "least": "most"}
    for row in made[1][SOME]:
        right = row["answer"]
        match = CALL.search(right)
        assert match is not None
        step, _, n, *_ = match.groups()
        assert sandbox.run(right, row["tests"]).passes, right
        for wrong in (right.replace(f" {n})", f" {int(n) + 1})"), right.replace(f".{step}(", f".{others[step]}(")):
            assert not sandbox.run(wrong, row["tests"]).passes, wrong


@linux
def test_any_code_that_does_it_passes(made: tuple[list[dict[str, str]], list[dict[str, str]]]) -> None:
    """It is results that are compared, not the text: plain Python does as well as the library."""
    row = next(row for row in made[1] if ".over(" in row["answer"] and ".total(" in row["answer"])
    match = CALL.search(row["answer"])
    assert match is not None
    _, key, n, _, end_key = match.groups()
    loop = f"sum(book['{end_key}'] for book in shelf if book['{key}'] > {n})"
    plain = row["answer"].replace(match[0], loop)
    assert sandbox.run(plain, row["tests"]).passes
    assert not sandbox.run("", row["tests"]).passes
