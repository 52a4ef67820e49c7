"""Byte counts from text and to text."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_lance.errors import ConfigError
from lightning_lance.tensors.units import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("given", "count"),
    [
        (1, 1),
        (7, 7),
        (123456789, 123456789),
        ("7", 7),
        ("7 B", 7),
        ("500kB", 500_000),
        ("500 KB", 500_000),
        (" 12 b ", 12),
        ("3KIB", 3072),
        ("4MiB", 4 << 20),
        ("1.5 GB", 1_500_000_000),
        (" 4 MiB ", 4 * 2**20),
        ("0.5GiB", 2**29),
        ("1.5gb", 1_500_000_000),
        (2e6, 2_000_000),
    ],
)
def test_parse(given: Any, count: int) -> None:
    assert parse_bytes(given) == count


@pytest.mark.parametrize(
    "given",
    [
        *[0, -1, 0.0, True, None, [], "", "MB", "MiB", "-3MB", "0kB", "3 TB", "4 TiBs", "4,5 MB", "1e3", "1e6"],
        *["3MB MB", "4 MiB please", "nan"],
    ],
)
def test_what_is_no_count_is_refused_with_the_units(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"is not a number of bytes\. Allowed: a positive int") as caught:
        parse_bytes(given)
    assert repr(given) in str(caught.value)
    assert "KiB, MiB, GiB" in str(caught.value)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 KB"),
        (1234, "1.23 KB"),
        (1_234_567, "1.23 MB"),
        (999_999, "1 MB"),
        (11_300_000, "11.3 MB"),
        (12_345_678_901, "12.3 GB"),
        (4.2e12, "4.2e+03 GB"),
        (5e15, "5e+06 GB"),
        (-2048, "-2.05 KB"),
    ],
)
def test_format(count: float, text: str) -> None:
    assert format_bytes(count) == text
