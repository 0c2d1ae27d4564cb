"""Symbolic sizes as numbers: rounding, and which symbols a graph's memory may fall with."""

from __future__ import annotations

import sympy
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._sympy.functions import FloorDiv, Max, Mod

from chunkft_fx.graph.sizes import SizeReader, Sizes, round_up
from chunkft_fx.torch_sizes import _never_falls

ROWS, LENGTH = sympy.symbols("s0 s1", integer=True, positive=True)


@given(st.integers(1, 10**7), st.integers(1, 10**7))
def test_sizes_are_rounded_up_by_less_than_a_quarter(size: int, other: int) -> None:
    rounded = round_up(size)
    assert size <= rounded < size * 1.25
    assert round_up(rounded) == rounded
    assert size > other or rounded <= round_up(other)


def test_few_sizes_are_left() -> None:
    assert len({round_up(n) for n in range(1024, 2049)}) == 5


def test_what_never_falls_is_told_from_what_may() -> None:
    for rising in (
        ROWS,
        4 * ROWS * LENGTH + 3,
        LENGTH**2 * ROWS - 1,
        FloorDiv(ROWS * LENGTH, sympy.Integer(4)),
        Max(ROWS, LENGTH),
    ):
        assert _never_falls(rising)
    for doubtful in (128 - LENGTH, Mod(LENGTH, 4), FloorDiv(128, LENGTH), ROWS * (64 - LENGTH)):
        assert not _never_falls(doubtful)


def test_a_size_that_memory_may_fall_with_is_covered_by_itself_only() -> None:
    reader = SizeReader((("s0", 0, 0), ("s1", 0, 1)), frozenset({"s0"}))
    planned = Sizes((("s0", 8), ("s1", 16)))
    assert reader.covers(planned, Sizes((("s0", 5), ("s1", 16))))
    assert not reader.covers(planned, Sizes((("s0", 5), ("s1", 15))))
    assert not reader.covers(planned, Sizes((("s0", 9), ("s1", 16))))
    assert reader.rounded(Sizes((("s0", 9), ("s1", 17)))) == Sizes((("s0", 10), ("s1", 17)))
