"""The room's one door: counts that add up, a split that stays, faults that say what would work."""

import contextlib
import hashlib
import json
import random
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest
from conftest import END, byte_tokenizer

from qtune.data import prepare as prepare_room
from qtune.data import row_stream
from qtune.data.prepare import Prepared, prepare
from qtune.errors import DataError, ModelError
from qtune.recipe.schema import Columns, Data, Model, Recipe, Train

TOKENIZER = byte_tokenizer()


def rows_file(folder, rows: list[dict], name: str = "rows.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def run(source: str, seed: int = 0, tokenizer=TOKENIZER, **data: object) -> Prepared:
    recipe = Recipe(name="t", model=Model(base="demo"), data=Data(train=source, **data), train=Train(seed=seed))
    return prepare(recipe, tokenizer)


def questions(count: int) -> list[dict]:
    return [{"question": f"what is {i}?", "answer": "it is " + "x" * (i % 7)} for i in range(count)]


def test_every_row_is_accounted_for(tmp_path) -> None:
    rows = [
        *questions(40),
        {"question": "q", "answer": None},
        {"question": "long " * 100, "answer": "a"},
        questions(1)[0],
    ]
    prepared = run(rows_file(tmp_path, rows), max_tokens=100, on_bad_row="drop", held_out_fraction=0.25)
    report = prepared.report
    dropped = sum(reason.rows for reason in report.dropped)
    assert report.rows_read == len(rows) == report.train_rows + report.held_out_rows + dropped
    assert {reason.reason for reason in report.dropped} == {
        "the answer is null",
        "is longer than data.max_tokens = 100",
    }
    assert report.held_out_rows == round(0.25 * 41)
    assert report.tokens == sum(len(example.input_ids) for example in prepared.train)
    assert report.trained_tokens == sum(example.trained_tokens for example in prepared.train)
    assert report.duplicate_rows + report.overlap_rows == 1
    assert json.dumps(report.sample)


def test_the_split_follows_the_seed_and_nothing_else(tmp_path) -> None:
    source = rows_file(tmp_path, questions(50))
    first, again, other = run(source, seed=1), run(source, seed=1, packing=False), run(source, seed=2)
    assert first.held_out == again.held_out
    assert first.fingerprint == again.fingerprint
    assert first.held_out != other.held_out
    assert first.fingerprint != other.fingerprint
    places = [int(example.place.split(":")[1]) for example in first.train]
    assert places == sorted(places)


def test_the_fingerprint_is_that_of_the_ids_and_labels_as_json(tmp_path) -> None:
    """Older runs hold it in their lock: it must not change with how rows are held."""
    prepared = run(rows_file(tmp_path, questions(50)), held_out_fraction=0.2)
    digest = hashlib.sha256()
    for part in (prepared.train, prepared.held_out):
        for example in part:
            digest.update(json.dumps([example.input_ids, example.labels]).encode())
        digest.update(b"|")
    assert prepared.fingerprint == digest.hexdigest()


def test_a_large_file_is_looked_through_for_bad_rows_before_any_is_tokenised(tmp_path, monkeypatch) -> None:
    """A broken line nine million in was told after an hour of tokenising."""
    monkeypatch.setattr(prepare_room, "LOOKED_AT_FIRST_BYTES", 100)
    source, heard = rows_file(tmp_path, questions(50)), []
    with open(source, "a") as file:
        file.write('{"question": "half\n')
    recipe = Recipe(name="t", model=Model(base="demo"), data=Data(train=source))
    with pytest.raises(DataError, match=r"rows\.jsonl:51: is not JSON"):
        prepare(recipe, TOKENIZER, lambda what, done, total: heard.append(what))
    assert set(heard) == {"looking for bad rows"}
    assert run(source, on_bad_row="drop").report.rows_read == 51


def test_a_file_of_empty_lines_holds_no_rows(tmp_path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"rows\.jsonl: holds no rows\."):
        run(str(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize("wanted", [{"on_bad_row": "error"}, {"on_bad_row": "drop"}])
def test_a_file_of_bad_rows_alone_is_not_called_empty(tmp_path, wanted) -> None:
    (tmp_path / "rows.jsonl").write_text("null\n3\n")
    with pytest.raises(DataError, match=r"is null, not an object|no row can be used\. 1 of 2 rows: is null") as refused:
        run(str(tmp_path / "rows.jsonl"), **wanted)
    assert "holds no rows" not in str(refused.value)


def test_once_a_row_is_bad_no_other_is_encoded(tmp_path, monkeypatch) -> None:
    """Whoever made a mistake is not to wait for a tokenizer; all bad rows are counted for all that."""
    encoded = []
    monkeypatch.setattr(row_stream, "tokenize", lambda rows, *how: encoded.extend(rows) or [])
    good = json.dumps(questions(1)[0])
    (tmp_path / "rows.jsonl").write_text(f"null\n{good}\n{good}\n3\n")
    with pytest.raises(DataError, match=r"rows\.jsonl:1: is null.*\nrows\.jsonl:4: is a number"):
        run(str(tmp_path / "rows.jsonl"))
    assert encoded == []


def test_how_far_it_is_can_be_heard(tmp_path) -> None:
    heard = []
    recipe = Recipe(name="t", model=Model(base="demo"), data=Data(train=rows_file(tmp_path, questions(3000))))
    prepare(recipe, TOKENIZER, lambda *words: heard.append(words))
    assert heard[0] == ("tokenising", 1024, 3000)
    assert heard[-1] == ("tokenising", 3000, 3000)


def test_a_held_out_file_is_kept_apart(tmp_path) -> None:
    held_out = rows_file(tmp_path, questions(3), "held.jsonl")
    prepared = run(rows_file(tmp_path, questions(10)), held_out=held_out)
    assert (len(prepared.train), len(prepared.held_out)) == (10, 3)
    assert prepared.report.overlap_rows == 3


def test_without_packing_a_row_is_a_sequence(tmp_path) -> None:
    prepared = run(rows_file(tmp_path, questions(10)), packing=False, held_out_fraction=0.0)
    assert prepared.train_packs == tuple((i,) for i in range(10))
    assert prepared.held_out == ()


def test_truncation_is_counted_in_rows_and_trained_tokens(tmp_path) -> None:
    rows = [{"question": "q", "answer": "x" * 60}, {"question": "q", "answer": "y"}]
    report = run(rows_file(tmp_path, rows), max_tokens=40, on_long="truncate", held_out_fraction=0.0).report
    assert report.truncated_rows == 1
    assert report.trained_tokens_lost == 60 + 1 - 32  # of 60 bytes and the end of turn, 32 are kept
    assert report.longest_row_tokens == 40


@pytest.mark.parametrize(
    ("rows", "settings", "words"),
    [
        (questions(4), {"max_tokens": 8}, "The shortest row has"),
        (questions(4), {"max_tokens": 20, "on_long": "error"}, 'or choose data.on_long = "drop" or "truncate"'),
        (
            questions(4),
            {"max_tokens": 12, "on_long": "truncate"},
            "has nothing to train once cut. The shortest row has",
        ),
        (questions(4), {"columns": Columns(prompt="ask")}, 'data.columns.prompt = "ask"'),
        (questions(2), {"held_out_fraction": 0.9}, "usable rows are 2"),
        ([{"question": "q", "answer": None}] * 5, {}, "2 more rows like these"),
        (
            [{"question": "q", "answer": None}] * 5,
            {"on_bad_row": "drop"},
            "no row can be used. 5 of 5 rows: the answer is null",
        ),
        ([{"a": "b"}], {}, "no format fits the columns a"),
    ],
)
def test_nothing_to_train_on_says_what_would_work(tmp_path, rows, settings, words) -> None:
    with pytest.raises(DataError) as fault:
        run(rows_file(tmp_path, rows), **settings)
    assert words in str(fault.value)
    assert "rows" in str(fault.value)


def test_long_rows_are_named_where_they_are_an_error(tmp_path) -> None:
    rows = [{"question": "q", "answer": "a" * n} for n in (5, 900, 5, 1000, 800, 700)]
    with pytest.raises(DataError) as fault:
        run(rows_file(tmp_path, rows), max_tokens=100, on_long="error")
    lines = str(fault.value).splitlines()
    assert [line.split(":")[:2] for line in lines[:3]] == [
        ["rows.jsonl", "2"],
        ["rows.jsonl", "4"],
        ["rows.jsonl", "5"],
    ]
    assert "4 of 6 rows have more than data.max_tokens = 100, the longest 1,0" in lines[3]


def test_a_row_the_chat_template_rejects_is_a_bad_row(tmp_path) -> None:
    """It was left out without a word, whatever data.on_bad_row said."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% if 'no' in messages[0].content %}{{ raise_exception('it says no') }}{% endif %}" + (
        TOKENIZER.chat_template
    )
    rows = [*questions(5), {"question": "no", "answer": "a"}]
    source = rows_file(tmp_path, rows)
    with pytest.raises(DataError, match=r"rows\.jsonl:6: the chat template rejects it \(it says no\)"):
        run(source, tokenizer=tokenizer)
    report = run(source, tokenizer=tokenizer, on_bad_row="drop").report
    assert [(reason.rows, reason.places) for reason in report.dropped] == [(1, ("rows.jsonl:6",))]


def test_alpaca_rows_without_a_use_for_the_instruction(tmp_path) -> None:
    rows = [{"instruction": "Answer truthfully", "input": f"what is {i}?", "output": "x"} for i in range(5)]
    mapped = Columns(prompt="input", completion="output")
    prepared = run(rows_file(tmp_path, rows), columns=mapped, held_out_fraction=0.0)
    assert [example.prompt_text for example in prepared.train] == [f"what is {i}?" for i in range(5)]


def seeds(folder) -> dict[str, bytes]:
    """One small good file of every kind."""
    rows = [{"question": f"q{i}", "answer": "é" * i + "a", "n": i} for i in range(6)]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, folder / "a.parquet", compression="none")
    cells = "".join(f'"q{i}\nmore",a{i}\n' for i in range(6))
    return {
        "a.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(),
        "a.json": json.dumps(rows, indent=1).encode(),
        "a.csv": b"question,answer\n" + cells.encode(),
        "a.tsv": b"question\tanswer\n" + cells.replace(",", "\t").encode(),
        "a.txt": b"one\ntwo\n\nthree\r\n\r\nfour",
        "a.parquet": (folder / "a.parquet").read_bytes(),
    }


def test_mutated_files_are_trained_on_or_refused_in_words(tmp_path) -> None:
    """Of every file, each row read is used or counted as dropped; anything else is a DataError."""
    rng, used = random.Random(0), Counter[str]()
    good = seeds(tmp_path)
    inserts = [b"null", b"NaN", b"\\ud83d", b'"', b"[]", b"\0", b"\xff", b"\r", b",", b"\n", b"9" * 5000, b"[" * 3000]
    for _ in range(600):
        name = rng.choice(list(good))
        content = bytearray(good[name])
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(content))
            content[at : at + rng.randint(0, 6)] = rng.choice([*inserts, bytes([rng.randrange(256)]), b""])
        (tmp_path / name).write_bytes(bytes(content))
        settings = {"on_bad_row": rng.choice(["drop", "error"]), "on_long": rng.choice(["drop", "truncate", "error"])}
        with contextlib.suppress(DataError):
            report = run(str(tmp_path / name), max_tokens=rng.choice([16, 60, 500]), **settings).report
            dropped = sum(reason.rows for reason in report.dropped)
            made_of_texts = report.pieces - report.cut_texts
            assert report.rows_read == report.train_rows + report.held_out_rows + dropped - made_of_texts
            used[name] += 1
    assert used.keys() == good.keys()
    assert used.total() < 500


def test_documents_need_no_chat_template(tmp_path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    prepared = run(rows_file(tmp_path, [{"text": "abc"}] * 4), tokenizer=tokenizer)
    assert prepared.stop_token_ids == (END,)
    with pytest.raises(ModelError, match="no chat template"):
        run(rows_file(tmp_path, questions(4)), tokenizer=tokenizer)


def test_real_questions(material) -> None:
    prepared = run(str(material / "datasets" / "medquad" / "medquad_3000.jsonl"), max_tokens=4096)
    assert prepared.report.rows_read == 3000
    assert prepared.report.pack_fill_fraction > 0.98
