"""B2: a data file with anything in it is read, every row of it counted, or refused by file, row and reason."""

import copy
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
from qtune.recipe.schema import Data, Model, Recipe, Train

WHAT = "data files of every kind with bytes, values and rows changed"
HANGS_SECONDS = 5.0
WITH_TOOLS = """\
{{ bos_token }}{% if tools %}<|system|>{{ tools | tojson }}<|end|>
{% endif %}{% for m in messages %}<|{{ m.role if m.role != "tool" else "user" }}|>
{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content or "" }}\
{% for call in m.tool_calls or [] %}<call>{{ call.function.name }} {{ call.function.arguments | tojson }}</call>\
{% endfor %}<|end|>
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""  # shows what the base's own has no place for: tools, their calls and results, and thoughts
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
    templates = [tokenizer.chat_template, WITH_TOOLS]

    def judge(case: int) -> str | None:
        rng = random.Random(f"{seed} {case}")
        suffix = rng.choice(sorted(WRITERS))
        path = folder / f"mutated{suffix}"
        path.write_bytes(_mutated_bytes(rng, WRITERS[suffix](_mutated_rows(rng))))
        tokenizer.chat_template = rng.choice(templates)
        data = Data(
            train=str(path),
            held_out_fraction=rng.choice([0.0, 0.3]),
            max_tokens=rng.choice([16, 64, 512]),
            on_bad_row=rng.choice(["error", "drop"]),
            on_long=rng.choice(["drop", "truncate", "error"]),
            packing=rng.random() < 0.5,
            thoughts=rng.choice(["train", "train_all", "show", "drop"]),
            train_on=rng.choice(["all", "last"]),
        )
        try:
            train = Train(objective=rng.choice(["sft", "sft", "dpo", "orpo"]))
            report = prepare(
                Recipe(name="t", model=Model(base=str(shop.base)), data=data, train=train), tokenizer
            ).report
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
            row[rng.choice(sorted(row))] = _strange(rng)
        elif kind == 1 and row:
            del row[rng.choice(sorted(row))]
        elif kind == 2:
            row[rng.choice(["question", "text", "messages", "system", "", "x"])] = _strange(rng)
        elif kind == 3:
            rows.insert(rng.randrange(len(rows)), {})
        elif inside := [value for value in row.values() if isinstance(value, list) and value]:
            _mutate_within(rng, rng.choice(inside))
    return rows


def _strange(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(STRANGE))


def _mutate_within(rng: random.Random, values: list[Any]) -> None:
    """Something in a list of messages, tools or calls: an element, or what one of its keys holds."""
    at = rng.randrange(len(values))
    if isinstance(values[at], dict) and values[at] and rng.random() < 0.7:
        values[at][rng.choice([*values[at], "tool_calls", "tool_call_id", "weight", "train"])] = _strange(rng)
    else:
        values[at] = _strange(rng)


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


def _thoughts(rng: random.Random) -> Rows:
    """As a field, as a block of the answer, or as a column of its own."""
    asked, thought = {"role": "user", "content": "why?"}, "x" * rng.randrange(20)
    shapes: list[dict[str, Any]] = [
        {"messages": [asked, {"role": "assistant", "content": "so", "reasoning_content": thought}]},
        {"messages": [asked, {"role": "assistant", "content": f"<think>{thought}</think>so", "weight": 1}] * 2},
        {"question": "why?", "reasoning": thought, "answer": "so"},
    ]
    return [copy.deepcopy(rng.choice(shapes)) for _ in range(rng.randint(1, 5))]


def _calls(rng: random.Random) -> Rows:
    """Tools, a call and its result in the shape of one of the sets that people train on."""
    arguments: dict[str, Any] = {"city": "Oslo", "days": rng.randint(1, 9)}
    properties = {"city": {"type": "string"}, "days": {"type": "integer"}}
    schema = {"type": "object", "properties": properties, "required": ["city"]}
    tool = {"name": "weather", "description": "The weather.", "parameters": schema}
    called, asked = {"name": "weather", "arguments": arguments}, {"role": "user", "content": "Oslo?"}
    openai = {"role": "assistant", "tool_calls": [{"id": "a1", "type": "function", "function": called}]}
    result, said = {"role": "tool", "tool_call_id": "a1", "content": "wet"}, {"role": "assistant", "content": "Wet."}
    texts = {
        "human": "Oslo?",
        "function_call": json.dumps(called),
        "observation": "wet",
        "gpt": "Wet.",
    }
    turns = [{"from": role, "value": text} for role, text in texts.items()]
    chat = f"USER: Oslo?\nASSISTANT: <functioncall> {json.dumps(called)}\nFUNCTION RESPONSE: wet\nASSISTANT: Wet."
    listed = f"Here is a list of functions in JSON format that you can invoke:\n{json.dumps([tool])}"
    python = f"[weather(city='Oslo', days={arguments['days']})]"
    shapes: list[dict[str, Any]] = [
        {"messages": [asked, openai, result, said], "tools": [{"type": "function", "function": tool}]},
        {"conversations": turns, "tools": json.dumps([tool])},
        {"query": "Oslo?", "answers": json.dumps([called]), "tools": json.dumps([tool])},
        {"system": f"SYSTEM: You have functions. {json.dumps(tool)}", "chat": chat},
        {"system": listed, "conversations": [turns[0], {"from": "assistant", "value": python}]},
    ]
    return [copy.deepcopy(rng.choice(shapes)) for _ in range(rng.randint(1, 4))]


def _pairs(rng: random.Random) -> Rows:
    """Two answers to a question: as text, as messages, as whole conversations, and as transcripts."""
    good, bad = ("x" * rng.randint(1, 9) + end for end in "ab")
    asked, turns = {"role": "user", "content": "why?"}, [{"role": "assistant", "content": text} for text in (good, bad)]
    shapes: list[dict[str, Any]] = [
        {"prompt": "why?", "chosen": good, "rejected": bad},
        {"prompt": [asked], "chosen": [turns[0]], "rejected": [turns[1]]},
        {"chosen": [asked, turns[0]], "rejected": [asked, turns[1]]},
        {name: f"\n\nHuman: why?\n\nAssistant: {text}" for name, text in (("chosen", good), ("rejected", bad))},
        {"conversations": [{"from": "human", "value": "why?"}], "chosen": turns[0], "rejected": turns[1]},
    ]
    return [copy.deepcopy(rng.choice(shapes)) for _ in range(rng.randint(1, 5))]


GOOD = (_questions, _questions, _chats, _texts, _thoughts, _calls, _calls, _pairs)


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
