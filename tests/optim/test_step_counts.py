"""Step counts per slice, against a plain list with one count per index."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkft_fx.optim.states.step_counts import Run, counted, is_partition, uniform, within


def listed(counts: tuple[Run, ...]) -> list[int]:
    return [run.step for run in counts for _ in range(run.length)]


@given(st.integers(1, 20), st.integers(0, 3), st.lists(st.tuples(st.integers(0, 19), st.integers(1, 20)), max_size=8))
def test_counts_equal_a_list_of_counts(size: int, step: int, updates: list[tuple[int, int]]) -> None:
    counts, expected = uniform(size, step), [step] * size
    for start, length in updates:
        start = min(start, size - 1)
        length = min(length, size - start)
        inside = within(counts, start, length)
        assert listed(inside) == expected[start : start + length]
        assert inside[0].start == start
        counts = counted(counts, start, length)
        expected[start : start + length] = [c + 1 for c in expected[start : start + length]]
        assert listed(counts) == expected
        assert is_partition(counts, size)
        assert all(a.step != b.step for a, b in pairwise(counts))


@pytest.mark.parametrize(
    "runs",
    [(), (Run(0, 3, 1),), (Run(0, 5, 1),), (Run(1, 3, 1),), (Run(0, 2, 1), Run(3, 1, 1)), (Run(0, 2, 1), Run(1, 3, 1))]
    + [(Run(0, 4, -1),), (Run(0, 0, 1), Run(0, 4, 1)), (Run(0, 4, True),)],
)
def test_other_runs_are_no_partition(runs: tuple[Run, ...]) -> None:
    assert not is_partition(runs, 4)
