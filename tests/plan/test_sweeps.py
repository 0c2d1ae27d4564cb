"""How long a sweep is, and how often it updates a weight: counted over the schedule, and as a plan tells it."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkft_fx.plan.chunk import Chunk, Slice
from chunkft_fx.plan.plan import Plan
from chunkft_fx.plan.schedule import ORDERS, ChunkSchedule, sweep_steps, updates_in

WHOLE = Chunk((Slice("w", 0, 0, 8, 8),), 8, 16)
PLAN = Plan(2**30, (WHOLE,) * 64, "ascending", 1, 0, predicted_step_us=334_000.0)


@given(
    steps=st.integers(0, 90),
    chunks=st.integers(1, 9),
    interval=st.integers(1, 5),
    order=st.sampled_from(ORDERS),
    seed=st.integers(0, 3),
    warms_up=st.booleans(),
)
def test_updates_are_those_that_a_schedule_counts(
    steps: int, chunks: int, interval: int, order: str, seed: int, warms_up: bool
) -> None:
    schedule, counts = ChunkSchedule(chunks, order, interval, seed, warms_up=warms_up), [0] * chunks
    for _ in range(steps):
        counts[schedule.chunk] += 1
        schedule.advance()
    assert updates_in(steps, chunks, interval, warms_up) == (min(counts), max(counts))


@given(chunks=st.integers(2, 9), interval=st.integers(1, 5))
def test_a_sweep_is_over_when_the_schedule_says_so(chunks: int, interval: int) -> None:
    schedule, steps = ChunkSchedule(chunks, interval=interval), 0
    while schedule.sweep == 0:
        schedule.advance()
        steps += 1
    assert sweep_steps(chunks, interval) == steps
    assert updates_in(steps, chunks, interval, False) == (interval, interval)


@given(chunks=st.integers(2, 9), interval=st.integers(1, 5))
def test_where_chunks_warm_up_the_first_sweep_alone_has_turns_of_one_step(chunks: int, interval: int) -> None:
    schedule, seen = ChunkSchedule(chunks, interval=interval, warms_up=True), []
    for _ in range(chunks + 2 * chunks * interval):
        seen.append(schedule.chunk)
        schedule.advance()
    later = [chunk for chunk in range(chunks) for _ in range(interval)]
    assert seen == [*range(chunks), *later, *later]
    assert (schedule.sweep, schedule.is_at_start) == (3, True)


def test_with_one_chunk_every_step_is_a_sweep() -> None:
    plan = dataclasses.replace(PLAN, chunks=PLAN.chunks[:1], interval=5)
    assert (plan.sweep_steps, plan.predicted_sweep_us, plan.updates_in(1000)) == (1, 334_000.0, (1000, 1000))
    assert "a sweep is one step, which updates every weight" in str(plan)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "a sweep of 64 steps updates every weight once, predicted to take 21.4 s"),
        ({"interval": 20}, "a sweep of 1,280 steps updates every weight 20 times, predicted to take 427.5 s"),
        ({"predicted_step_us": 2_000.0}, "a sweep of 64 steps updates every weight once, predicted to take 128 ms"),
        ({"predicted_step_us": None}, "a sweep of 64 steps updates every weight once"),
    ],
)
def test_a_plan_says_how_long_a_sweep_takes(changes: dict[str, object], line: str) -> None:
    assert line in str(dataclasses.replace(PLAN, **changes)).splitlines()  # type: ignore[arg-type]
