"""Sizes as people write and read them."""

import pytest

from qtune.units import (
    GIB,
    KIB,
    MIB,
    counted,
    format_bytes,
    format_count,
    format_percent,
    format_rate,
    format_seconds,
    parse_bytes,
    parse_seconds,
)


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


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("10min", 600), (" 10 min ", 600), ("1.5h", 5400), ("0.5min", 30), ("0s", None), ("10", None)]
    + [(text, None) for text in ("", "min", "10 m", "-1s", "1e3s", "10mins", ".5h", "1d")],
)
def test_a_duration_is_read(text: str, seconds: float | None) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (250, "4 min 10 s"),
        (3599, "59 min 59 s"),
        (3600, "1 h 00 min"),
        (7500, "2 h 05 min"),
    ],
)
def test_seconds_are_told_in_minutes_of_60_and_hours_of_60(seconds: float, told: str) -> None:
    assert format_seconds(seconds) == told


@pytest.mark.parametrize(
    ("form", "value", "told"),
    [
        (format_bytes, 1023, "1023 B"),
        (format_bytes, 1024, "1.0 KiB"),
        (format_bytes, 12 * MIB, "12 MiB"),
        (format_bytes, 3.2 * GIB, "3.2 GiB"),
        (format_count, 812, "812"),
        (format_count, 99_999, "99,999"),
        (format_count, 412_000, "412k"),
        (format_count, 33e6, "33.0M"),
        (format_count, 8e9, "8.0B"),
        (format_rate, 2e-4, "2.0e-4"),
        (format_rate, 0.01, "1.0e-2"),
        (format_percent, 0.008, "0.8 %"),
        (format_percent, 1, "100.0 %"),
    ],
)
def test_a_number_is_told_in_a_unit_that_suits_it(form, value: float, told: str) -> None:
    assert form(value) == told
