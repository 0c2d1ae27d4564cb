"""The ring of states: as deep as it pays and the budget lets it be, and no deeper than another batch has room for."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkft_fx.errors import BudgetInfeasible
from chunkft_fx.plan.chunk import Chunk
from chunkft_fx.plan.pieces import DEPTH, MOST_BUFFERS, Pieces, cut_pieces
from chunkft_fx.plan.plan import Plan
from chunkft_fx.plan.policy import HIDDEN_SHARE, LinkUse, Policy, StepTimes
from chunkft_fx.plan.state_spec import ASSUMED
from chunkft_fx.planning.coverage import ring
from chunkft_fx.planning.planner import Options, parameter_specs, plan_again, plan_for_batch
from chunkft_fx.predict.fixed_memory import RING_OF_STATES
from chunkft_fx.predict.step_time import Work, covering_step_us
from tests.planning.test_search import Blocks, Predicted

SPEC = replace(ASSUMED, updates="backward")
MODEL = Blocks(4, 64)


class Clocked(Predicted):
    """The clock tells that each buffer more saves ``gain`` of a step that takes 1,000 without one."""

    gain = 10.0

    def clocked(self, chunk: Chunk, policy: Policy) -> LinkUse:
        return LinkUse(1000.0 - self.gain * policy.pieces.depth, 0.0, 0.0, 0.0, 0, 0, 0.0)


def planned(budget: int, has_times: bool = True, gain: float = Clocked.gain) -> Plan:
    options = Options(budget, "auto", "sequential", 1, 0, coverage="all")
    predictor = Clocked(MODEL, 4_000, 0, 1_000, has_times)
    predictor.gain = gain
    return plan_for_batch(MODEL, options, None, predictor, "a batch", SPEC)


def least_nbytes() -> int:
    """The smallest budget that is enough."""
    with pytest.raises(BudgetInfeasible) as refused:
        planned(1)
    return refused.value.smallest_budget_bytes


@given(st.integers(0, 2_000_000))
def test_the_rest_of_the_budget_goes_to_a_ring_that_saves_time(more: int) -> None:
    plan = planned(least_nbytes() + more)
    depth, terms = plan.policy.pieces.depth, dict(plan.terms)
    assert DEPTH <= depth <= MOST_BUFFERS
    assert terms[RING_OF_STATES] % depth == 0
    assert plan.predicted_peak_bytes == sum(terms.values()) <= plan.budget_bytes
    buffer = terms[RING_OF_STATES] // depth
    assert depth == MOST_BUFFERS or sum(terms.values()) + buffer > plan.budget_bytes


@given(st.integers(0, 2_000_000), st.floats(0.0, 10.0))
def test_a_ring_is_no_deeper_than_it_has_to_be(more: int, gain: float) -> None:
    """A shallower one would take longer by more than a small share of the step, unless there is none."""
    budget = least_nbytes() + more
    depth, deepest = (planned(budget, gain=g).policy.pieces.depth for g in (gain, Clocked.gain))
    assert depth <= deepest
    if gain == 0.0:
        assert depth == DEPTH
    least = (1000 - gain * deepest) * (1 + ring.NEARLY)
    if depth > DEPTH:
        assert 1000 - gain * (depth - 1) > least * (1 - 1e-9)


@pytest.mark.parametrize("gain", [10.0, -1.0])
def test_the_clock_decides_whether_a_deeper_ring_is_worth_what_it_takes(
    monkeypatch: pytest.MonkeyPatch, gain: float
) -> None:
    """Where each buffer more makes a step shorter, weights give way to buffers; else they do not."""
    budget = least_nbytes() + 100_000
    monkeypatch.setattr(ring, "DEPTHS", (DEPTH,))
    shallow = planned(budget, gain=gain).policy
    monkeypatch.undo()
    taken = planned(budget, gain=gain).policy
    if gain < 0:
        assert taken == shallow
    else:
        assert taken.pieces.depth > shallow.pieces.depth
        assert len(taken.streamed) > len(shallow.streamed)


def test_a_ring_stays_small_where_no_times_are_known() -> None:
    assert planned(10**9, has_times=False).policy.pieces.depth == DEPTH
    assert planned(10**9).policy.pieces.depth == MOST_BUFFERS


def test_a_ring_has_no_more_buffers_than_there_are_pieces() -> None:
    few = Pieces(cut_pieces(parameter_specs(MODEL, SPEC))[:5])
    assert few.deepened(10**12, 1).depth == 5
    assert replace(few, chunks=few[:2]).deepened(10**12, 1).depth == DEPTH


def test_another_batch_keeps_the_ring_where_it_fits_and_takes_a_small_one_where_it_does_not() -> None:
    budget = least_nbytes() + 1_000_000
    known = planned(budget)
    options = Options(budget, "auto", "sequential", 1, 0, coverage="all")
    deep = known.policy.pieces.depth
    assert deep > DEPTH

    def again(inside: int) -> Plan:
        return plan_again(MODEL, options, known, Predicted(MODEL, 4_000, 0, inside, True), "another", SPEC)

    assert again(1_000).policy.pieces is known.policy.pieces
    larger = again(budget - (known.predicted_peak_bytes or 0) + 100_000)
    assert larger.policy.pieces.depth == DEPTH
    assert larger.policy.pieces.chunks is known.policy.pieces.chunks
    assert not larger.policy.same_places(known.policy)
    with pytest.raises(BudgetInfeasible):
        again(budget)


@given(st.lists(st.floats(1.0, 100.0), min_size=2, max_size=5), st.floats(0.0, 5_000.0), st.integers(3, 12))
def test_buffers_hide_copies_under_the_forward_and_under_nothing_else(
    us: list[float], states: float, depth: int
) -> None:
    zero = (0.0,) * len(us)
    times = StepTimes(tuple(us), tuple(us), zero, zero, zero, zero, 0.0, 0.0)
    (whole,) = cut_pieces(parameter_specs(Blocks(1, 4), SPEC)).chunks[:1]
    pieces = Pieces((whole,) * 12)

    def step(at: int) -> float:
        policy = Policy(pieces=replace(pieces, depth=at), in_backward=True)
        return covering_step_us(times, policy, frozenset(), Work(0, 0.0, states))

    early = min(states * depth / 12, sum(us))
    assert step(depth) == pytest.approx(sum(us) + max(sum(us), states - early))
    assert step(depth + 1) <= step(depth)


def test_states_that_share_the_link_hide_less() -> None:
    us, zero = (10.0,) * 4, (0.0,) * 4
    times = StepTimes(us, us, zero, zero, (3.0,) * 4, (2.0,) * 4, 0.0, 0.0)
    policy = Policy(pieces=replace(cut_pieces(parameter_specs(MODEL, SPEC)), depth=DEPTH), in_backward=True)
    alone = covering_step_us(times, policy, frozenset(), Work(0, 0.0, 100.0))
    early = 100.0 * DEPTH / len(policy.pieces)
    assert alone == pytest.approx(40 + 100 - early)
    streaming = covering_step_us(times, policy, frozenset({1, 2}), Work(0, 0.0, 100.0))
    assert streaming == pytest.approx(40 + 6 + (100 - early) / HIDDEN_SHARE)
    offloading = covering_step_us(
        times, replace(policy, save_from=2, offload_below=2), frozenset(), Work(0, 0.0, 100.0)
    )
    assert offloading == pytest.approx(40 + 4 + (100 - early) / HIDDEN_SHARE)
