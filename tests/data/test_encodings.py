"""Which files and texts are in the wrong encoding, and what they were meant to be."""

from pathlib import Path

import pytest

from qtune.data.encodings import as_utf8, encoding_of, lost_characters, mojibake

CHINESE = "这是一个关于药物的问题，请回答。"


def test_lines_that_are_not_utf8_are_named_with_what_they_seem_to_be(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbffine\n" + CHINESE.encode("gbk") + b"\n" + CHINESE.encode() + b"\n")
    found = encoding_of(path)
    assert (found.lines, found.has_bom, found.bad_lines, found.probably) == (3, True, (2,), "gb18030")


def test_the_copy_has_the_same_name_and_lines_and_is_gone_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_bytes(b"gut\n" + CHINESE.encode("gbk") + b"\n")
    with as_utf8(path, encoding_of(path)) as copy:
        assert copy.name == path.name
        assert copy.read_text(encoding="utf-8") == f"gut\n{CHINESE}\n"
    assert not copy.exists()


def test_a_good_file_is_not_copied(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_text(CHINESE, encoding="utf-8")
    with as_utf8(path, encoding_of(path)) as same:
        assert same == path


def test_a_lost_character_is_shown_with_its_surroundings() -> None:
    assert lost_characters("x" * 90 + "a\ufffdb") == "x" * 11 + "a\ufffdb"
    assert lost_characters("all there") is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a naÃ¯ve question", "naÃ¯ve for naïve"),
        ("Ð¿Ñ€Ð¸Ð²ÐµÑ‚", "Ð¿Ñ€Ð¸Ð²ÐµÑ‚ for привет"),
        (f"so: {'你好世界'.encode().decode('gbk')}", "浣犲ソ涓栫晫 for 你好世界"),
        ("锟斤拷", "锟斤拷, characters lost between UTF-8 and GBK"),
    ],
)
def test_mojibake_is_told_with_what_it_was(text: str, told: str) -> None:
    assert mojibake(text) == told


@pytest.mark.parametrize(
    "text", ["plain", "Größe über alles", "ça va été", "Привет мир", CHINESE, "日本語です", "5 € »so«"]
)
def test_real_text_in_any_script_is_none(text: str) -> None:
    assert mojibake(text) is None
