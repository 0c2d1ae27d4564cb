"""Holds step counts per slice: how often each index of a parameter's cut dimension has been updated.

Bias correction needs the number of updates that a moment has seen, and chunks update slices of a
parameter at different times. A parameter's counts are a tuple of runs that partition the dimension in
order; they say nothing of chunks, so that another plan simply cuts them elsewhere. A run also has the other numbers
that its optimizer keeps of it, if any.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from chunkft_fx.optim.states.numbers import Numbers


class Run(NamedTuple):
    """``length`` indices from ``start`` on, all updated ``step`` times, and the ``numbers`` kept of them."""

    start: int
    length: int
    step: int
    numbers: Numbers = ()


Counts = tuple[Run, ...]


def uniform(size: int, step: int = 0, numbers: Numbers = ()) -> Counts:
    """Counts of a dimension of ``size`` indices that were all updated ``step`` times."""
    return (Run(0, size, step, numbers),)


def within(counts: Counts, start: int, length: int) -> Counts:
    """The runs inside ``[start, start + length)``, clipped to it."""
    end = start + length
    clipped = (
        Run(max(r.start, start), min(r.start + r.length, end) - max(r.start, start), r.step, r.numbers) for r in counts
    )
    return tuple(r for r in clipped if r.length > 0)


def counted(counts: Counts, start: int, length: int, after: Mapping[int, Numbers] | None = None) -> Counts:
    """The counts after one more update of ``[start, start + length)``; ``after`` are the runs' new numbers by start."""
    new = after or {}
    size = counts[-1].start + counts[-1].length
    updated = [r._replace(step=r.step + 1, numbers=new.get(r.start, r.numbers)) for r in within(counts, start, length)]
    return _merged([*within(counts, 0, start), *updated, *within(counts, start + length, size - start - length)])


def is_partition(runs: Iterable[Run], size: int) -> bool:
    """True when the runs follow each other from 0 to ``size`` with whole, non-negative counts."""
    end = 0
    for run in runs:
        if not all(type(v) is int for v in run[:3]) or run.start != end or run.length < 1 or run.step < 0:
            return False
        end += run.length
    return end == size


def _merged(runs: list[Run]) -> Counts:
    merged: list[Run] = []
    for run in runs:
        if merged and merged[-1][2:] == run[2:]:
            merged[-1] = merged[-1]._replace(length=merged[-1].length + run.length)
        else:
            merged.append(run)
    return tuple(merged)
