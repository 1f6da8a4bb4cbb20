"""Every key of a TOML text is found on its line, whatever the writer's habits; tomllib says which keys there are."""

import random
import tomllib
from typing import Any

import pytest

from qtune.recipe.toml_reader import Key, first_use, key_lines


def keys_of(value: Any, above: Key = ()) -> set[Key]:
    """Every table, key and array element of a parsed document."""
    if isinstance(value, dict):
        items = list(value.items())
    else:
        items = [(str(number), element) for number, element in enumerate(value)] if isinstance(value, list) else []
    return {(*above, name) for name, _ in items}.union(*(keys_of(inner, (*above, name)) for name, inner in items))


CASES = {
    "tables and comments": ('# a\nname = "x" # b\n\n[lora] # c\nrank = 3\n', {("name",): 2, ("lora", "rank"): 5}),
    "dotted keys": ("lora.rank = 1\nlora . alpha = 2\n", {("lora",): 1, ("lora", "rank"): 1, ("lora", "alpha"): 2}),
    "a table in a table": ("[demo.data]\ntrain='x'\n[demo]\n", {("demo",): 1, ("demo", "data", "train"): 2}),
    "quoted keys": ('"a.b" = 1\n\'c\' = 2\n"\\u0064\\"" = 3\n', {("a.b",): 1, ("c",): 2, ('d"',): 3}),
    "a table with a quoted name": ('[ data . "co]l" ]\nx = 1\n', {("data", "co]l", "x"): 2}),
    "inline tables": (
        'data = { train = "x", columns = {a.b = 1} }\nz = {}\n',
        {("data", "columns", "a", "b"): 1, ("z",): 2},
    ),
    "a list over several lines": ('a = [\n  "x", # ]\n\n  "y",\n]\nb = 1\n', {("a", "0"): 2, ("a", "1"): 4, ("b",): 6}),
    "tables in a list": ("a = [\n {x = 1},\n {y = [\n2]},\n]\n", {("a", "0", "x"): 2, ("a", "1", "y", "0"): 4}),
    "a text over several lines": ('a = """\n[b]\nc = 1 \\"""\n"""\nd = 2\n', {("a",): 1, ("d",): 5}),
    "a literal over several lines": ("a = '''\n\\''b'' = 1\n'''\nd = 2\n", {("d",): 4}),
    "quotes at the end of a text": ('a = """x"""""\nb = \'\'\'y\'\'\'\'\'\nc = ""\nd = 2\n', {("b",): 2, ("d",): 4}),
    "a text that ends in a backslash": ('a = "\\\\" # "\nb = \'\\\'\nc = """\\\\"""\nd = 1\n', {("c",): 3, ("d",): 4}),
    "marks inside texts": ('a = "= [x] #" # {\nb = 1\n', {("a",): 1, ("b",): 2}),
    "numbers and dates": ("a = 1.5e-3\nb = 2026-11-24 07:32:00.5\nc = -inf\nd = 1\n", {("b",): 2, ("d",): 4}),
    "tables of an array": (
        "[[a]]\nx = 1\n[a.b]\ny = 2\n[[a]]\n[[a.c]]\nz = 3\n[[a.c]]\n",
        {("a", "0", "x"): 2, ("a", "0", "b", "y"): 4, ("a", "1"): 5, ("a", "1", "c", "0", "z"): 7},
    ),
    "Windows line ends": ("a = 1\r\n[b]\r\nc = [\r\n1,\r\n]\r\nd = 2\r\n", {("b", "c", "0"): 4, ("b", "d"): 6}),
    "nothing": ("", {}),
    "no line end at the end": ("a = 1\nb = 2", {("b",): 2}),
}


@pytest.mark.parametrize("name", CASES)
def test_keys_are_on_their_lines(name: str) -> None:
    text, expected = CASES[name]
    lines = key_lines(text)
    assert {key: lines[key] for key in expected} == expected
    assert set(lines) == keys_of(tomllib.loads(text))


def random_value(rng: random.Random, depth: int = 0) -> str:
    kind = rng.randrange(10 if depth < 3 else 7)
    if kind >= 8:
        inner = ", ".join(f"{name} = {random_value(rng, depth + 1)}" for name in rng.sample("abcd", rng.randrange(3)))
        return "{ " + inner + " }"
    if kind == 7:
        gap = rng.choice(["", " ", "\n", " # ] }\n", "\n\n"])
        return "[" + ",".join(gap + random_value(rng, depth + 1) + gap for _ in range(rng.randrange(4))) + gap + "]"
    simple = ["true", "1_000", "-1.5e-3", "1979-05-27 07:32:00", "inf", '"#=[]{},"', "'\\'", '"\\\\\\""', '""']
    several = ['"""\nx = 1\n"""', "'''a''b\n[t]\n'''", '"""\\"""\n""\\\\"""', '"""x"""""', "''''y''''"]
    return rng.choice(simple if kind < 5 else several)


def random_document(rng: random.Random) -> tuple[str, dict[Key, int]]:
    """A valid text of tables and keys in many styles, and the line of each key outside of values."""
    text, expected = "", dict[Key, int]()
    for table in range(rng.randrange(1, 5)):
        above: Key = ()
        if table:
            above = (f"t{table}", "sub") if rng.random() < 0.4 else (f"t{table}",)
            text += f"[{rng.choice(['.', ' . ']).join(above)}]{rng.choice(['', ' # x = 1'])}\n"
        for number in range(rng.randrange(4)):
            text += rng.choice(["", "\n", "# [comment]\n", "  "])
            name, part = f"k{number}", rng.choice([(), ("p",)])
            expected[(*above, name, *part)] = text.count("\n") + 1
            written = rng.choice([name, f'"{name}"', f"'{name}'"])
            text += ".".join([written, *part]) + f" ={rng.choice(['', ' '])}{random_value(rng)}\n"
    return text, expected


def test_random_documents_are_read_as_tomllib_reads_them() -> None:
    rng = random.Random(0)
    for _ in range(400):
        text, expected = random_document(rng)
        lines = key_lines(text)
        assert set(lines) == keys_of(tomllib.loads(text)), text
        assert {key: lines[key] for key in expected} == expected, text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a = 1\nb = 2\na = 3", (("a",), 1)),
        ("[t]\nx = 1\n[u]\n[t", (("t",), 1)),
        ("a = 1\n[a.b", (("a",), 1)),
        ("[a.b]\nx = 1\n[a]\nb.y = 2", (("a", "b"), 1)),
        ("a = {b = 1, b.c = 2", None),
    ],
)
def test_a_repeated_name_is_traced_to_its_first_use(text: str, expected: tuple[Key, int] | None) -> None:
    assert first_use(text) == expected
