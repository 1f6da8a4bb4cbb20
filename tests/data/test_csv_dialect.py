"""CSV as Excel writes it: semicolons, tabs, the code page of its Windows; and what is no cp1252 is not read as such."""

from pathlib import Path

import pytest
from conftest import byte_tokenizer
from read_rows import read_rows

from qtune.data.csv_dialect import Sheet
from qtune.data.prepare import prepare
from qtune.errors import DataError
from qtune.recipe.schema import Data, Model, Recipe

ROWS = 'question;answer\nWas ist das für ein Gerät?;"Das ist, kurz; gut"\n;\nUnd das?;Nichts.\n'


def written(folder: Path, content: str | bytes, name: str = "a.csv") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252"])
def test_what_excel_writes_in_germany_is_read(tmp_path: Path, encoding: str) -> None:
    """It was refused: the columns as one, and the letters as a DOS code page of the Baltic."""
    path = written(tmp_path, ROWS.replace("\n", "\r\n").encode(encoding))
    rows = read_rows(str(path)).rows
    assert [list(row.values.values()) for row in rows] == [
        ["Was ist das für ein Gerät?", "Das ist, kurz; gut"],
        ["Und das?", "Nichts."],
    ]
    assert [row.place for row in rows] == ["a.csv:2", "a.csv:4"]
    notice = Sheet.of(path).notice
    assert notice is not None
    assert "parted by semicolons" in notice
    assert ("is no UTF-8 and read as cp1252, which Excel writes (für in line 2)" in notice) == (encoding == "cp1252")


@pytest.mark.parametrize(
    ("name", "content", "delimiter"),
    [
        ("a.csv", "x,y\n1;2,3\n", ","),
        ("a.csv", "x\ty\n1,5\t2\n", "\t"),
        ("a.csv", "x;y, z\n1;2\n3;4\n", ";"),
        ("a.csv", "text\nhello; there\n", ","),
        ("a.csv", 'x;y\n"1\n;";2\n', ";"),
        ("a.tsv", "x\ty\n1,2\t3;4\n", "\t"),
        ("a.tsv", "x;y\n1;2\n", ";"),
        ("a.csv", "x|y\n1|2\n", "|"),
    ],
)
def test_the_delimiter_is_what_gives_even_rows(tmp_path: Path, name: str, content: str, delimiter: str) -> None:
    assert Sheet.of(written(tmp_path, content, name)).delimiter == delimiter


def test_the_usual_is_not_worth_a_word(tmp_path: Path) -> None:
    assert Sheet.of(written(tmp_path, "x,y\nfür,2\n")).notice is None


@pytest.mark.parametrize(
    "text",
    [
        "für",
        "Größe und Ärger",
        "É possível; não",
        "où est-elle, ça va",
        "El señor comió",
        "Kjøkken, å være",
        "it’s “fine” for 5 €",
        "Käse\xa01",
    ],
)
def test_languages_of_the_west_are_read(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, f"question,answer\nq,{text}\n".replace(", ", " ").encode("cp1252"))
    assert read_rows(str(path)).rows[0].values["answer"] == text.replace(", ", " ")


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("cp1250", "Příliš žluťoučký kůň"),
        ("cp1250", "Zażółć gęślą jaźń"),
        ("cp1250", "Mi a válasz? Őrült"),
        ("cp1251", "Какой ответ"),
        ("cp1251", "да"),
        ("cp1253", "Καλημέρα κόσμε"),
        ("cp1254", "Bu sorunun cevabı değil"),
        ("gb18030", "这是一个问题"),
        ("cp932", "これは質問です"),
        ("cp949", "안녕하세요"),
    ],
)
def test_another_code_page_is_refused_and_never_read_wrong(tmp_path: Path, encoding: str, text: str) -> None:
    with pytest.raises(DataError, match=r"a\.csv:2: is not UTF-8 but probably [A-Z]+.* Excel calls that"):
        read_rows(str(written(tmp_path, f"question,answer\nq,{text}\n".encode(encoding))))


@pytest.mark.parametrize(
    ("last", "words"),
    [("für".encode(), "and line 4,000 is UTF-8"), (b"a \x81 b", "a.csv:4,000: is not UTF-8 but in another encoding")],
)
def test_a_file_that_is_not_cp1252_throughout_is_refused(tmp_path: Path, last: bytes, words: str) -> None:
    """Lines in UTF-8 would be read as mojibake, and a byte that cp1252 lacks would end in a traceback."""
    lines = ["question,answer", *("q,für Käse und Brötchen" for _ in range(3998))]
    path = written(tmp_path, "\n".join(lines).encode("cp1252") + b"\nq," + last + b"\n")
    with pytest.raises(DataError, match=words):
        read_rows(str(path))


def test_a_run_says_how_the_file_was_read(tmp_path: Path) -> None:
    data = Data(train=str(written(tmp_path, ROWS.encode("cp1252"))))
    report = prepare(Recipe(name="t", model=Model(base="demo"), data=data), byte_tokenizer()).report
    assert [notice for notice in report.notices if "cp1252" in notice and "semicolons" in notice]


@pytest.mark.parametrize("first", ["Was ist das?,Ein Test", f"{'lang ' * 80},x", "7,Seven", "Ja.,Ja.", "What is it?,"])
def test_a_missing_header_is_suspected_in_few_words(tmp_path: Path, first: str) -> None:
    """Three hundred characters of a row were printed as names of columns."""
    path = written(tmp_path, f"{first}\nq,a\nq,b\n")
    with pytest.raises(DataError, match="has the file no header") as fault:
        prepare(Recipe(name="t", model=Model(base="demo"), data=Data(train=str(path))), byte_tokenizer())
    assert len(str(fault.value).replace(str(path), "")) < 250
