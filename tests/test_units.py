"""Sizes as people write and read them."""

import pytest

from qtune.units import GIB, KIB, MIB, counted, format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("6GiB", 6 * GIB),
        ("7.5 GiB", 15 * GIB // 2),
        ("8G", 8 * GIB),
        ("8g", 8 * GIB),
        ("800 MB", 800_000_000),
        ("512KiB", 512 * KIB),
        (" 1 TiB ", 1024 * GIB),
        ("0.5MiB", MIB // 2),
    ],
)
def test_a_size_is_read(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "auto", "6", "GiB", "6 zib", "-1GiB", "0GiB", "1e3GiB", "6GiBs", "6 G iB", ".5GiB", "1,000 MB", "9" * 12],
)
def test_anything_else_is_no_size(text: str) -> None:
    assert parse_bytes(text) is None


@pytest.mark.parametrize("size", [5, 900, 3 * KIB, 123 * MIB, 7 * GIB, round(9.96 * GIB), 1234 * GIB])
def test_what_is_printed_can_be_read_back(size: int) -> None:
    if size >= KIB:
        assert parse_bytes(format_bytes(size).replace(",", "")) == pytest.approx(size, rel=0.06)


@pytest.mark.parametrize(
    ("number", "noun", "told"),
    [
        (0, "fault", "0 faults"),
        (1, "row", "1 row"),
        (4213, "row", "4,213 rows"),
        (1.0, "epoch", "1 epoch"),
        (1.5, "epoch", "1.5 epochs"),
        (2, "canary", "2 canaries"),
        (2, "key", "2 keys"),
    ],
)
def test_a_noun_agrees_with_its_number(number: float, noun: str, told: str) -> None:
    assert counted(number, noun) == told
