"""B2: a data file with anything in it is read, every row of it counted, or refused by file, row and reason."""

import csv
import io
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from fault_lab.workshop import Workshop, isolated
from qtune.data.prepare import prepare
from qtune.errors import DataError, ModelError
from qtune.model.tokenizer import load_tokenizer
from qtune.recipe.schema import Data, Model, Recipe

WHAT = "data files of every kind with bytes, values and rows changed"
HANGS_SECONDS = 5.0
Rows = list[dict[str, Any]]
STRANGE: list[Any] = [
    *(None, True, 0, -1.5, 1e308, "", " ", "\0", "\ud800", "\u202e", "x" * 5000, [], {}, [[]], [None], {"": None}),
    *(
        [{"role": "user", "content": "hi"}],
        [{"role": "bot", "content": 1}],
        {"role": "user"},
        "NaN",
        "<|end|>",
        "{{ 1 }}",
    ),
]
PIECES = [
    b"\0",
    b"\xff",
    b"\n",
    b"\r",
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b"\t",
    b"null",
    b"NaN",
    b"\xef\xbb\xbf",
    b"\\u",
    b"1e999",
]


def run(cases: int, seed: int, folder: Path) -> Iterator[str | None]:
    shop = Workshop.open(folder, seed)
    tokenizer = load_tokenizer(Model(base=str(shop.base)))

    def judge(case: int) -> str | None:
        rng = random.Random(f"{seed} {case}")
        suffix = rng.choice(sorted(WRITERS))
        path = folder / f"mutated{suffix}"
        path.write_bytes(_mutated_bytes(rng, WRITERS[suffix](_mutated_rows(rng))))
        data = Data(
            train=str(path),
            held_out_fraction=rng.choice([0.0, 0.3]),
            max_tokens=rng.choice([16, 64, 512]),
            on_bad_row=rng.choice(["error", "drop"]),
            on_long=rng.choice(["drop", "truncate", "error"]),
            packing=rng.random() < 0.5,
        )
        try:
            report = prepare(Recipe(name="t", model=Model(base=str(shop.base)), data=data), tokenizer).report
        except (DataError, ModelError) as refusal:
            is_placed = path.name in str(refusal) or "data." in str(refusal)
            return None if is_placed else f"{suffix}: {refusal}"
        counted = report.train_rows + report.held_out_rows + sum(reason.rows for reason in report.dropped)
        counted -= report.pieces - report.cut_texts
        return (
            None if counted == report.rows_read else f"{suffix}: {report.rows_read} rows read, {counted} accounted for"
        )

    yield from isolated(cases, judge, HANGS_SECONDS)


def _mutated_rows(rng: random.Random) -> Rows:
    rows: Rows = rng.choice(GOOD)(rng)
    for _ in range(rng.choice([0, 1, 1, 3])):
        row = rng.choice(rows)
        kind = rng.randrange(5)
        if kind == 0 and row:
            row[rng.choice(sorted(row))] = rng.choice(STRANGE)
        elif kind == 1 and row:
            del row[rng.choice(sorted(row))]
        elif kind == 2:
            row[rng.choice(["question", "text", "messages", "system", "", "x"])] = rng.choice(STRANGE)
        elif kind == 3:
            rows.insert(rng.randrange(len(rows)), {})
        elif row and isinstance(turns := row.get("messages"), list) and turns:
            turns[rng.randrange(len(turns))] = rng.choice(STRANGE)
    return rows


def _mutated_bytes(rng: random.Random, content: bytes) -> bytes:
    for _ in range(rng.choice([0, 0, 1, 2, 5])):
        at = rng.randrange(len(content) + 1)
        kind = rng.randrange(4)
        if kind == 0:
            content = content[:at] + rng.choice(PIECES) + content[at:]
        elif kind == 1:
            content = content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]
        elif kind == 2:
            content = content[:at] + content[at + rng.randint(1, 20) :]
        else:
            content = content[:at] if rng.random() < 0.5 else content + content[at:]
    return content


def _questions(rng: random.Random) -> Rows:
    return [
        {"question": f"what is {i}?", "answer": "it is " + "x" * rng.randrange(30)} for i in range(rng.randint(1, 8))
    ]


def _chats(rng: random.Random) -> Rows:
    turns = [{"role": role, "content": "x" * rng.randint(1, 20)} for role in ("user", "assistant")]
    return [{"messages": [dict(turn) for turn in turns * rng.randint(1, 2)]} for _ in range(rng.randint(1, 5))]


def _texts(rng: random.Random) -> Rows:
    return [{"text": "lorem ipsum " * rng.randint(1, 9)} for _ in range(rng.randint(1, 8))]


GOOD = (_questions, _questions, _chats, _texts)


def _jsonl(rows: Rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _table(delimiter: str) -> Callable[[Rows], bytes]:
    def write(rows: Rows) -> bytes:
        names = sorted({name for row in rows for name in row})
        file = io.StringIO()
        writer = csv.DictWriter(file, names, delimiter=delimiter, escapechar="\\")
        writer.writeheader()
        writer.writerows(rows)
        return file.getvalue().encode(errors="replace")

    return write


def _parquet(rows: Rows) -> bytes:
    """As a table where the rows fit one, else with every value as text."""
    file = io.BytesIO()
    try:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    except (pyarrow.ArrowException, UnicodeError, TypeError):
        texts = [{name: ascii(value) for name, value in row.items()} for row in rows]
        file = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(texts), file)
    return file.getvalue()


WRITERS: dict[str, Callable[[Rows], bytes]] = {
    ".jsonl": _jsonl,
    ".json": lambda rows: json.dumps(rows).encode(),
    ".csv": _table(","),
    ".tsv": _table("\t"),
    ".txt": lambda rows: "\n\n".join(str(row) for row in rows).encode(errors="replace"),
    ".parquet": _parquet,
}
