"""Budgets: what is accepted, what is refused, and how bytes are printed."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkft_fx.bytes import UNITS, format_bytes, parse_bytes
from chunkft_fx.errors import BudgetParseError


@pytest.mark.parametrize(
    ("written", "nbytes"),
    [
        ("24GB", 24_000_000_000),
        ("24GiB", 24 * 2**30),
        ("24 GB", 24_000_000_000),
        (" 1kB ", 1000),
        ("1KiB", 1024),
        ("1.5MB", 1_500_000),
        ("0.5MiB", 2**19),
        ("2TB", 2 * 10**12),
        ("2TiB", 2 * 2**40),
        ("13.3GiB", 14_280_766_259),
        ("7B", 7),
        ("1.9B", 1),
        (1, 1),
        (8 * 2**30, 8 * 2**30),
    ],
)
def test_budget_is_parsed(written: str | int, nbytes: int) -> None:
    assert parse_bytes(written) == nbytes


@pytest.mark.parametrize(
    "bad",
    ["", "24", "GB", "24XB", "24Gb", "24gb", "-1GB", "+1GB", "1e3GB", "NaN", "nanGB", "infGB", "1,5GB", "24  GB"]
    + ["٣GB", "24GB extra", ".5GB", "0GB", "0.1B", 0, -1, True, 24.0, float("nan"), None, [24]],
)
def test_anything_else_is_refused_with_a_hint(bad: Any) -> None:
    with pytest.raises(BudgetParseError, match=r'such as "24GB"') as caught:
        parse_bytes(bad)
    assert repr(bad) in str(caught.value)


@given(st.integers(1, 10**6), st.integers(0, 999), st.sampled_from(sorted(UNITS)))
def test_decimals_are_exact(whole: int, thousandths: int, unit: str) -> None:
    number = f"{whole}.{thousandths:03d}"
    assert parse_bytes(number + unit) == Decimal(number) * UNITS[unit] // 1


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (64 * 2**20, "64.0 MiB"), (14_280_766_259, "13.3 GiB")],
)
def test_bytes_are_printed_in_the_unit_they_fill(nbytes: int, text: str) -> None:
    assert format_bytes(nbytes) == text
