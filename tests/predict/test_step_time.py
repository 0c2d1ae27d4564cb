"""The time of a step from the times of its parts: compute and copies side by side."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkft_fx.plan.policy import HIDDEN_SHARE, Policy, StepTimes
from chunkft_fx.predict.step_time import SweepWork, Work, bare_steps, least_cost, step_us, streamed_regions, sweep_cost

us = st.floats(0.1, 100.0)


@st.composite
def times(draw: st.DrawFn) -> StepTimes:
    count = draw(st.integers(2, 6))
    forward, backward, again, gradients, fetch, keep = (
        tuple(draw(st.lists(us, min_size=count, max_size=count))) for _ in range(6)
    )
    return StepTimes(forward, backward, again, gradients, fetch, keep, 1e-3, 1e-4)


@given(times())
def test_resident_weights_cost_what_runs(t: StepTimes) -> None:
    count = len(t.forward_us)
    bare = bare_steps(t, Policy(0), frozenset(), 2)
    for lowest in range(count):
        assert bare.compute_us[lowest] == pytest.approx(sum(t.forward_us) + sum(t.backward_us[lowest:]))
        assert bare.link_us[lowest] == 0


@given(times(), st.integers(2, 3))
def test_a_chunk_that_no_region_reads_has_no_backward(t: StepTimes, depth: int) -> None:
    everything = frozenset(range(len(t.forward_us)))
    none = Work(len(t.forward_us), 1.5, 0.0)
    resident = bare_steps(t, Policy(0), frozenset(), depth)
    assert step_us(resident, none) == pytest.approx(sum(t.forward_us) + 1.5)
    bare = bare_steps(t, Policy(2, 1), everything, depth)
    assert bare.link_us[-1] == pytest.approx(sum(t.fetch_us))
    assert np.all(np.diff(bare.compute_us) <= 1e-9)
    assert SweepWork.of([none]).steps_us(bare) == pytest.approx([step_us(bare, none)])


@given(times(), st.data())
def test_recomputing_streaming_and_fewer_buffers_never_make_a_step_faster(t: StepTimes, data: st.DataObject) -> None:
    count = len(t.forward_us)
    save_from = data.draw(st.integers(0, count - 1))
    streamed = data.draw(st.frozensets(st.integers(0, count - 1), min_size=1))
    work = Work(data.draw(st.integers(0, count - 1)), 5.0, data.draw(us))

    def step(saving: Policy, away: frozenset[int], depth: int) -> float:
        return step_us(bare_steps(t, saving, away, depth), work)

    base = step(Policy(save_from), streamed, 2)
    assert step(Policy(save_from + 1), streamed, 2) >= base - 1e-9
    assert step(Policy(save_from), streamed, 3) <= base + 1e-9
    assert step(Policy(save_from), frozenset(), 2) <= base + 1e-9
    assert step(Policy(save_from, save_from), streamed, 2) >= base - 1e-9


def test_a_step_waits_for_the_slower_of_compute_and_link() -> None:
    t = StepTimes((10.0,) * 3, (10.0,) * 3, (5.0,) * 3, (10.0,) * 3, (40.0,) * 3, (1.0,) * 3, 1e-3, 0.0)
    everything = frozenset(range(3))
    # two buffers: forward waits for three fetches in a row and ends 10 after the last; backward likewise
    bare = bare_steps(t, Policy(0), everything, 2)
    assert bare.compute_us[0] == 2 * (3 * 40 + 10)
    assert bare.link_us[0] == 6 * 40
    assert step_us(bare, Work(0, 1.0, 0.0)) == 261.0
    assert step_us(bare, Work(0, 1.0, HIDDEN_SHARE * 100)) == 340.0


@given(times(), st.integers(2, 3), st.data())
def test_streamed_regions_wait_no_longer_than_evenly_spread_ones(t: StepTimes, depth: int, data: st.DataObject) -> None:
    regions = len(t.forward_us)
    count = data.draw(st.integers(0, regions))

    def waits(place: tuple[int, ...]) -> float:
        bare = bare_steps(t, Policy(0), frozenset(place), depth)
        return float(np.maximum(bare.compute_us, bare.link_us)[:-1].mean())

    even = streamed_regions(regions, count, None, depth)
    placed = streamed_regions(regions, count, t, depth)
    for place in (even, placed):
        assert list(place) == sorted(set(place))
        assert len(place) == count
        assert set(place) <= set(range(regions))
    assert even == tuple((2 * i + 1) * regions // (2 * count) for i in range(count))
    assert waits(placed) <= waits(even)


def test_streamed_regions_keep_away_from_where_nothing_hides_a_fetch() -> None:
    # a block's fetch takes longer than its forward, and there is no work before the first block
    t = StepTimes((0.1, *(50.0,) * 32, 100.0), (0.1, *(100.0,) * 32, 1.0), *((70.0,) * 34,) * 4, 0.0, 0.0)
    assert streamed_regions(34, 18, None, 2)[0] == 0
    placed = streamed_regions(34, 18, t, 2)
    assert 0 not in placed
    assert 33 not in placed


@given(times(), st.lists(st.tuples(st.integers(0, 1), us, us), min_size=1, max_size=5))
def test_a_sweep_is_priced_as_its_steps(t: StepTimes, works: list[tuple[int, float, float]]) -> None:
    bare = bare_steps(t, Policy(1), frozenset({0}), 2)
    chunks = [Work(*w) for w in works]
    steps = [step_us(bare, w) for w in chunks]
    assert SweepWork.of(chunks).steps_us(bare) == pytest.approx(steps)
    assert sweep_cost(np.array(steps)) == pytest.approx(sum(steps))


@given(times(), st.integers(1, 40))
def test_the_least_cost_is_a_bound(t: StepTimes, chunks: int) -> None:
    """Of equal chunks, whose lowest regions are spread evenly, with everything resident and saved."""
    regions, states = len(t.forward_us), 10_000
    bare = bare_steps(t, Policy(0), frozenset(), 2)
    share = states / chunks
    works = [
        Work(k * regions // chunks, sum(t.gradients_us) / chunks, share * t.state_us_per_byte) for k in range(chunks)
    ]
    assert least_cost(t, states, chunks) <= sweep_cost(np.array([step_us(bare, w) for w in works])) + 1e-6
