"""What is no TOML is refused by line, in words for its writer."""

from pathlib import Path
from typing import Any

import pytest

from qtune.errors import RecipeError
from qtune.recipe import toml_reader
from qtune.recipe.toml_reader import Key


def fault(tmp_path: Path, content: str | bytes) -> str:
    path = tmp_path / "r.toml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    try:
        found = [toml_reader.placed(path, each.line, each.sentence) for each in toml_reader.read(path).broken]
    except RecipeError as error:
        found = list(error.faults)
    return found[0].removeprefix(f"{tmp_path}/")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('name = "a"\nname = "b"\n', "r.toml:2: name is set on line 1 already"),
        ("[data]\nx = 1\n[lora]\n[data]\n", "r.toml:4: data is set on line 1 already"),
        ("data = 3\n[data.columns]\n", "r.toml:2: data is set on line 1 already"),
        ("data = {a = 1, a = 2}\n", "r.toml:1: a setting is in the braces twice"),
        ("data = {a = 1, a.b = 2}\n", "r.toml:1: a setting is there twice"),
        ('x = 1\nname = "abc\n', "r.toml:2: a text has no closing quote"),
        ("x = 1\nname = 'abc\n", "r.toml:2: a text has no closing quote"),
        ('name = """abc\n\n', "r.toml:1: a text has no closing quote"),
        ('targets = ["a" "b"]\n', "r.toml:1: a list needs commas"),
        ('x = 1\ntargets = ["a",\n', "r.toml:2: a list needs commas"),
        ('data = { train = "x"\n', "r.toml:1: a table in braces"),
        ("packing = True\n", "r.toml:1: TOML writes true with a small letter"),
        ("rslora = yes\n", "r.toml:1: TOML writes yes as true"),
        ("subset = None\n", "r.toml:1: TOML has no None"),
        ("[model]\nbase = Qwen/Qwen3 # big\n", 'r.toml:2: text needs quotes: base = "Qwen/Qwen3"'),
        ("name = “medical”\n", 'r.toml:1: text needs quotes: name = "medical"'),
        ("targets = [q_proj, v_proj]\n", "r.toml:1: a value is not TOML; text needs quotes in a list too"),
        ("learning_rate = .5\n", "r.toml:1: the value is no number in TOML"),
        ("base =\n", "r.toml:1: base has no value"),
        ("name: medical\n", "r.toml:1: a setting is written name = value, and there is no = here"),
        ("x = 1\n[model\n", "r.toml:2: the name of a table is not closed with ]"),
        ('{\n "name": "x"\n}\n', "r.toml:1: this looks like JSON"),
        ('base = "C:\\models"\n', "r.toml:1: a backslash is written"),
        ("learning_rate = 0,01  # so\n", "r.toml:1: a number has a point and no comma: learning_rate = 0.01"),
        ("rank = 16,\n", "r.toml:1: something follows the value"),
        ("x = 1\n]\n", "r.toml:2: this is neither a [table] nor a setting"),
        ('base = "a\x01b"\n', "r.toml:1: this is not TOML (Illegal character"),
        ("x = " + "9" * 5000, "r.toml: is no recipe: it holds a number of thousands of digits."),
        ("x = " + "[" * 5000 + "]" * 5000, "r.toml: is no recipe: its lists or tables are nested too deeply."),
    ],
)
def test_a_syntax_fault_has_its_line_and_a_remedy(text: str, expected: str, tmp_path: Path) -> None:
    assert fault(tmp_path, text).startswith(expected)


def broken(tmp_path: Path, text: str) -> tuple[list[tuple[int, Key]], dict[str, Any]]:
    path = tmp_path / "r.toml"
    path.write_text(text)
    found = toml_reader.read(path)
    return [(each.line, each.key) for each in found.broken], found.values


def test_a_line_that_is_broken_by_itself_is_read_past(tmp_path: Path) -> None:
    """The first slip in the syntax ended the list of mistakes."""
    text = 'name = "x"\n[train]\nlearning_rate = 0,01\nepochs = 2\n[ lora ] # c\nrank 16\nrank = 3\nrank = 4\n'
    assert broken(tmp_path, text) == (
        [(3, ("train", "learning_rate")), (6, ("lora", "rank")), (8, ("lora", "rank"))],
        {"name": "x", "train": {"epochs": 2}, "lora": {"rank": 3}},
    )
    text = "[lora]\ntargets = [\n  q_proj,\n  'v_proj',\n]\nrank = 1\n"
    assert broken(tmp_path, text) == ([(3, ("lora", "q_proj"))], {"lora": {"targets": ["v_proj"], "rank": 1}})


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("a = 0,1\n[model\nb = 2\nc = x\n", [1, 2]),  # b would move to another table
        ("a = 0,1\n[x]\n[y]\n[x]\nb = x\n", [1, 4]),
        ('a = 0,1\nb = """\nc = x\n', [1, 3]),
        ('{\n"name": "x",\n"b": 2\n}\n', [1]),
        ("name: x\nmodel:\n  base: y\n", [1]),  # another language from end to end is one fault
    ],
)
def test_where_the_rest_could_mean_something_else_reading_ends(text: str, lines: list[int], tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(text)
    with pytest.raises(RecipeError) as found:
        toml_reader.read(path)
    assert [int(fault.removeprefix(f"{path}:").partition(":")[0]) for fault in found.value.faults] == lines


def test_the_line_itself_is_shown_without_control_characters(tmp_path: Path) -> None:
    assert fault(tmp_path, "[lora]\n  rank = 16 8\n").endswith(" The line is: rank = 16 8")
    assert fault(tmp_path, 'a = "\x1b[2J"\n').isprintable()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "r.toml: is empty."),
        (b"\xef\xbb\xbf \r\n", "r.toml: is empty."),
        (b'a = 1\nb = "x\xe9"\n', "r.toml:2: byte 7 of the line, 0xe9, is not UTF-8."),
        ("name = 1".encode("utf-16"), "r.toml: is UTF-16 text."),
        (b"PK\x03\x04\x14\x00\x06\x00", "r.toml: is no text file."),
        (b"#" * (toml_reader.MAX_BYTES + 1), "r.toml: is over 1.0 MiB"),
    ],
)
def test_bytes_that_are_no_toml_text(content: bytes, expected: str, tmp_path: Path) -> None:
    assert fault(tmp_path, content).startswith(expected)


def test_a_byte_order_mark_and_windows_line_ends_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_bytes(b'\xef\xbb\xbfname = "x"\r\nabout = """a\r\nb"""\r\n[lora]\r\n')
    found = toml_reader.read(path)
    assert found.values == {"name": "x", "about": "a\nb", "lora": {}}
    assert found.lines == {("name",): 1, ("about",): 2, ("lora",): 4}


@pytest.mark.parametrize("name", ["nowhere.toml", "x" * 300, "a\0b", "."])
def test_a_path_that_cannot_be_read(name: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError):
        toml_reader.read(tmp_path / name)


def test_an_excel_file_is_no_recipe(material: Path) -> None:
    with pytest.raises(RecipeError, match="is no text file"):
        toml_reader.read(material / "datasets" / "messy" / "excel_file_named.tsv")
