"""Names of files, folders and the hub: which is which, from where, and is it there."""

from pathlib import Path

import pytest

from qtune.recipe.data_files import files_in
from qtune.recipe.paths import fault_of, made_absolute
from qtune.recipe.toml_reader import Key

TRAIN, BASE, TEMPLATE = ("data", "train"), ("model", "base"), ("model", "chat_template")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "rows").mkdir()
    (tmp_path / "org" / "model").mkdir(parents=True)
    (tmp_path / "plain").write_text("x")
    return tmp_path


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        (TRAIN, "rows.jsonl", "rows.jsonl"),
        (TRAIN, " rows.jsonl ", "rows.jsonl"),
        (TRAIN, "missing.CSV", "missing.CSV"),
        (TRAIN, "./missing", "missing"),
        (TRAIN, "plain", "plain"),
        (TRAIN, "sub/../rows.jsonl", "rows.jsonl"),
        (("demo", "data", "held_out"), "x.parquet", "x.parquet"),
        (BASE, "org/model", "org/model"),
        (BASE, "./nowhere", "nowhere"),
        (BASE, ".", ""),
        (("demo", "model", "base"), "../x", "../x"),
        (TEMPLATE, "chat.jinja", "chat.jinja"),
        (("demo", *TEMPLATE), "chat.jinja", "chat.jinja"),
        (TEMPLATE, "./plain", "plain"),  # "plain" is one of qtune's own, also where a file is called so
        (TRAIN, "~/rows", "~/rows"),
        (TRAIN, "/data/rows.txt", "/data/rows.txt"),
    ],
)
def test_paths_become_absolute(key: Key, value: str, expected: str, folder: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(folder / "home"))
    wanted = {"~/rows": folder / "home" / "rows", "../x": folder.parent / "x"}.get(expected, folder / expected)
    assert made(key, value, folder) == str(wanted)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (TRAIN, "org/data"),
        (TRAIN, "squad"),
        (BASE, "demo"),
        (BASE, "other/model"),
        (BASE, "plain"),  # a file beside the recipe is no base
        (("data", "system"), "./rows.jsonl"),
        (("name",), "rows"),
        (TEMPLATE, "plain"),
        (("demo", *TEMPLATE), "chatml"),
        (("evaluate", "general"), "none"),
    ],
)
def test_all_else_stays_as_it_is(key: Key, value: str, folder: Path) -> None:
    assert made(key, value, folder) == value
    assert fault_of(key, value) is None


def made(key: Key, value: str, folder: Path) -> str:
    values = value
    for part in reversed(key):
        values = {part: values}
    result = made_absolute(values, folder)
    for part in key:
        result = result[part]
    return result


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        (TRAIN, "{}/rwos.jsonl", "data.train: there is no file rwos.jsonl in {}. Did you mean rows.jsonl?"),
        (TRAIN, "{}/rows", "data.train: {}/rows is a folder, and a file is needed."),
        (TRAIN, "{}/nowhere/rows.jsonl", "data.train: there is no folder {}/nowhere."),
        (BASE, "{}/plain", "model.base: {}/plain is a file, and a folder is needed."),
        (BASE, "{}/q", "model.base: there is no folder q in {}."),
        (TRAIN, "{}/a\0b", 'data.train: there is no file "a\\u0000b" in {}.'),
        (TRAIN, "two words", 'data.train: "two words" is neither a file beside the recipe nor a hub name'),
        (BASE, "models/qwen/7b", 'model.base: "models/qwen/7b" is neither a folder beside the recipe nor a hub name'),
        (TEMPLATE, "{}/chat-ml", 'there is no file chat-ml in {}. Did you mean "chatml", of qtune\'s own chatml, '),
        (TEMPLATE, "{}/x.jinja", "there is no file x.jinja in {}. qtune has chatml, llama3, alpaca, plain itself."),
        (BASE, "Qwen\n", None),  # a hub name after the spaces around it are gone
    ],
)
def test_what_is_not_there_is_said(key: Key, value: str, expected: str | None, folder: Path) -> None:
    fault = fault_of(key, value.replace("{}", str(folder)))
    if expected is None:
        assert fault is None
    else:
        assert fault is not None
        assert fault[1].removeprefix("model.chat_template: ").startswith(expected.replace("{}", str(folder)))


@pytest.mark.parametrize(("key", "value"), [(TEMPLATE, "alpaca"), (("evaluate", "general"), "none")])
def test_a_word_stands_without_the_spaces_around_it(key: Key, value: str, folder: Path) -> None:
    assert made(key, f" {value}\n", folder) == value


@pytest.mark.parametrize("value", ["x" * 5000 + ".jsonl", "~nobody/x", "//x.csv", "a" * 90 + "/" + "../" * 50])
def test_odd_names_are_faults_or_paths_and_nothing_worse(value: str, folder: Path) -> None:
    fault_of(TRAIN, made(TRAIN, value, folder))


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (("dataset_dict.json", "test/state.json", "train/state.json"), "It holds splits that save_to_disk wrote: name"),
        (("a.txt", "rows.csv"), "It holds a.txt, rows.csv: name one file."),
        (("README.md", "data/a.parquet", "data/b.parquet"), "It holds data/a.parquet, data/b.parquet: name one file."),
        (("a.jsonl",), "It holds a.jsonl: name one file."),
        (("x.bin",), "and a file is needed."),
    ],
)
def test_a_folder_of_data_says_how_it_becomes_a_file(files: tuple[str, ...], told: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    fault = fault_of(TRAIN, str(tmp_path))
    assert fault is not None
    assert told in fault[1]
    assert fault[1].endswith(".")


@pytest.mark.parametrize(
    ("files", "read"),
    [
        (("b.md", "a.txt", "in/c.TXT", "d.txt.gz", ".git/e.md", "f.png"), ["a.txt", "b.md", "d.txt.gz", "in/c.TXT"]),
        (("README.md", "chapter.md"), ["README.md", "chapter.md"]),
        (("README.md",), []),
        (("a.txt", "rows.jsonl.gz"), []),
        (("state.json", "other.arrow", "x.arrow"), ["x.arrow"]),
    ],
)
def test_what_is_read_of_a_folder(files: tuple[str, ...], read: list[str], tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"_data_files": [{"filename": "x.arrow"}]}')
    assert files_in(tmp_path) == [tmp_path / name for name in read]
    assert (fault_of(TRAIN, str(tmp_path)) is None) == bool(read)


@pytest.mark.parametrize("state", ["", "[]", '{"_data_files": 3}', '{"_data_files": [{}]}'])
def test_a_saved_dataset_without_its_list_of_files_is_refused(state: str, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(state)
    assert fault_of(TRAIN, str(tmp_path)) is not None


def test_a_compressed_file_that_is_not_there_is_no_name_on_the_hub(folder: Path) -> None:
    fault = fault_of(TRAIN, made(TRAIN, "rosw.jsonl.gz", folder))
    assert fault is not None
    assert "there is no file rosw.jsonl.gz" in fault[1]
