"""The clock of a step that covers all parameters: bounds that hold for any times, and what can be told by hand."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import chunkft_fx
from chunkft_fx.plan import pieces
from chunkft_fx.plan.policy import LinkUse, Policy, StepTimes
from chunkft_fx.predict.predictor import Predictor
from chunkft_fx.predict.step_clock import COMPUTE, INCOMING, LANES, OUTGOING, UPDATES, Span, clocked_step, spans
from chunkft_fx.tools.zoo import tiny
from tests.predict.test_predictor import RATES, absent

us = st.floats(0.1, 100.0)


class Steps:
    """Programs of one small model, and what its pieces move."""

    def __init__(self, kind: str) -> None:
        model, batch = tiny("llama")
        self.compiled: Any = chunkft_fx.compile(model, "1GB", backend="eager", coverage="all")
        self.optimizer = chunkft_fx.AdamW(self.compiled, update=kind)
        self.compiled(**batch(2, 16, 0)).loss.backward()
        self.session = self.compiled._training.sessions[-1]
        self.predictor = Predictor(self.session.programs, absent(self.session), known=RATES)
        self.plan = self.compiled.plan
        self.regions = len(self.predictor.uses())

    def policy(self, **changes: Any) -> Policy:
        return replace(self.plan.policy, **changes)

    def clocked(self, policy: Policy, times: StepTimes) -> LinkUse:
        programs = self.session.programs
        program = programs.planned(self.plan.chunks[0], absent(self.session), policy).program
        return clocked_step(program, policy, times, programs.parameters, self.predictor._batch)

    def spans(self, policy: Policy, times: StepTimes) -> dict[str, list[Span]]:
        """What each lane does, in order."""
        programs = self.session.programs
        program = programs.planned(self.plan.chunks[0], absent(self.session), policy).program
        found = spans(program, policy, times, programs.parameters, self.predictor._batch)
        return {lane: [s for s in found if s.lane == lane] for lane in LANES}

    def moved(self) -> int:
        """Bytes of the states, one way."""
        weights = sum(p.nbytes for p in self.session.programs.parameters.values())
        return sum(piece.nbytes for piece in self.plan.policy.pieces) - weights

    def compute(self, policy: Policy, times: StepTimes) -> float:
        again = sum(times.recompute_us[: policy.save_from])
        return sum(times.forward_us) + sum(times.backward_us) + sum(times.gradients_us) + again


@pytest.fixture(scope="module", params=["backward", "step"])
def steps(request: pytest.FixtureRequest) -> Iterator[Steps]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pieces, "LARGEST_NBYTES", 100_000)
        yield Steps(request.param)


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, Any], tuple[tuple[float, ...], ...], float, int]:
    count = draw(st.sampled_from([1, 3]))
    below = draw(st.integers(0, 4))
    changes = {"micro_batches": count, "save_from": below, "offload_below": draw(st.integers(0, below))}
    each = tuple(tuple(draw(st.lists(us, min_size=4, max_size=4))) for _ in range(4))
    return changes, each, draw(st.floats(0.0, 1e-2)), draw(st.integers(1, 12))


def times_of(regions: int, each: tuple[tuple[float, ...], ...], per_byte: float) -> StepTimes:
    forward, backward, again, gradients = (tuple(e[i % len(e)] for i in range(regions)) for e in each)
    return StepTimes(forward, backward, again, gradients, (0.0,) * regions, (0.0,) * regions, per_byte, 1e-4)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(cases(), st.booleans())
def test_a_step_takes_as_long_as_the_busiest_and_no_longer_than_all_in_turn(
    steps: Steps, case: tuple[dict[str, Any], tuple[tuple[float, ...], ...], float, int], is_streamed: bool
) -> None:
    changes, each, per_byte, depth = case
    held = replace(steps.plan.policy.pieces, depth=depth)
    names = frozenset(n for n in steps.session.programs.parameters if ".1." in n) if is_streamed else frozenset()
    policy = steps.policy(pieces=held, streamed=names, **changes)
    times = times_of(steps.regions, each, per_byte)
    use = steps.clocked(policy, times)
    found = use.step_us
    compute, states = steps.compute(policy, times), steps.moved() * per_byte
    updates = sum(p.numel for p in held) * times.update_us_per_element
    assert compute * (1 - 1e-9) <= use.still_us <= found * (1 + 1e-9)
    assert use.still_us <= (compute + updates) * (1 + 1e-9)
    assert min(use.incoming_us, use.outgoing_us) >= states * (1 - 1e-9)
    assert 0 <= use.hidden <= 1
    floor = max(compute, states) if policy.in_backward else compute + states
    assert found >= floor * (1 - 1e-9)
    # weights pass three times at most, and values of all micro-batches twice
    weights = 3 * sum(steps.session.programs.parameters[n].nbytes for n in names) * per_byte
    values = 2 * policy.micro_batches * steps.predictor.offloaded_nbytes(steps.regions) * per_byte
    assert found <= (compute + 2 * states + updates + 2 * weights + values) * (1 + 1e-9)
    assert steps.clocked(policy, replace(times, state_us_per_byte=per_byte * 2)).step_us >= found * (1 - 1e-9)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(cases())
def test_spans_are_what_the_clock_counted(
    steps: Steps, case: tuple[dict[str, Any], tuple[tuple[float, ...], ...], float, int]
) -> None:
    changes, each, per_byte, depth = case
    names = frozenset(n for n in steps.session.programs.parameters if ".1." in n)
    policy = steps.policy(pieces=replace(steps.plan.policy.pieces, depth=depth), streamed=names, **changes)
    times = times_of(steps.regions, each, per_byte)
    use, lanes = steps.clocked(policy, times), steps.spans(policy, times)
    for lane in lanes.values():  # one thing after another
        assert all(b.begin_us >= a.end_us - 1e-6 for a, b in itertools.pairwise(lane))
    assert sum(s.nbytes for s in lanes[INCOMING]) == use.incoming_nbytes
    assert sum(s.nbytes for s in lanes[OUTGOING]) == use.outgoing_nbytes
    assert sum(s.end_us - s.begin_us for s in lanes[INCOMING]) == pytest.approx(use.incoming_us)
    done = max(s.end_us for s in (*lanes[COMPUTE], *lanes[UPDATES]))
    assert done == pytest.approx(use.step_us)
    assert lanes[COMPUTE][0].begin_us >= 0
    assert len(lanes[COMPUTE]) == 2 * steps.regions * policy.micro_batches


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=20)
@given(cases(), st.floats(1.0, 2.0))
def test_copies_slow_the_calls_beside_them_and_no_others(
    steps: Steps, case: tuple[dict[str, Any], tuple[tuple[float, ...], ...], float, int], slowed: float
) -> None:
    changes, each, per_byte, depth = case
    policy = steps.policy(pieces=replace(steps.plan.policy.pieces, depth=depth), **changes)
    times = times_of(steps.regions, each, per_byte)
    quick, slow = steps.spans(policy, times), steps.spans(policy, replace(times, slowed_by_copies=slowed))
    copies = [s for lane in (INCOMING, OUTGOING) for s in slow[lane]]
    # by then those of the step before have ended, which are not among them
    since = max((slow[lane][0].begin_us for lane in (INCOMING, OUTGOING) if slow[lane]), default=0.0)
    for before, call in zip(quick[COMPUTE], slow[COMPUTE], strict=True):
        us, more = before.end_us - before.begin_us, call.end_us - call.begin_us
        assert us - 1e-6 <= more <= slowed * us + 1e-6
        beside = sum(max(0.0, min(s.end_us, call.end_us) - max(s.begin_us, call.begin_us)) for s in copies)
        if call.begin_us >= since and not beside:
            assert more == pytest.approx(us)
    slower = steps.clocked(policy, replace(times, slowed_by_copies=slowed))
    quicker = steps.clocked(policy, times)
    assert slower.step_us >= quicker.step_us * (1 - 1e-9)
    assert slower.still_us == quicker.still_us


def test_a_split_head_takes_what_it_is_predicted_to_take_more(steps: Steps) -> None:
    times = replace(times_of(steps.regions, ((3.0, 5.0), (7.0,), (2.0,), (1.0,)), 0.0), split_us=((1, 0.0), (4, 11.0)))
    whole, split = (steps.clocked(steps.policy(head_split=n), times) for n in (1, 4))
    assert split.step_us == pytest.approx(whole.step_us + 11.0)


def test_a_piece_comes_is_updated_and_leaves(steps: Steps) -> None:
    """Each once, in that order, its bytes those of its states."""
    times = times_of(steps.regions, ((3.0, 5.0), (7.0,), (2.0,), (1.0, 4.0)), 1e-3)
    lanes, weights = steps.spans(steps.plan.policy, times), steps.session.programs.parameters
    by_lane = {lane: {s.what: s for s in found} for lane, found in lanes.items()}
    assert steps.plan.policy.pieces
    for i, piece in enumerate(steps.plan.policy.pieces):
        came, left = by_lane[INCOMING][f"states of piece {i}"], by_lane[OUTGOING][f"states of piece {i}"]
        updated = by_lane[UPDATES][f"update of piece {i}"]
        assert came.end_us <= updated.begin_us + 1e-6 and updated.end_us <= left.begin_us + 1e-6
        own = sum(weights[s.name].nbytes // s.size * s.length for s in piece.slices)
        assert came.nbytes == left.nbytes == piece.nbytes - own
        assert updated.end_us - updated.begin_us == pytest.approx(piece.numel * times.update_us_per_element)
    assert len(lanes[INCOMING]) == len(lanes[OUTGOING]) == len(lanes[UPDATES]) == len(steps.plan.policy.pieces)


def test_copies_that_take_no_time_leave_compute(steps: Steps) -> None:
    policy = steps.policy(micro_batches=3, save_from=4, offload_below=4)
    times = replace(times_of(steps.regions, ((3.0, 5.0), (7.0,), (2.0,), (1.0, 4.0)), 0.0), update_us_per_element=0.0)
    use = steps.clocked(policy, times)
    assert [use.step_us, use.still_us] == pytest.approx([steps.compute(policy, times)] * 2)
    assert use.hidden == 1.0
    slow = steps.clocked(policy, replace(times, update_us_per_element=0.01, state_us_per_byte=1e-9))
    assert slow.step_us > use.step_us  # for updates, which are not what the link adds
    assert slow.hidden > 0.9


def test_one_buffer_brings_updates_and_takes_each_piece_in_turn(steps: Steps) -> None:
    """Where compute takes no time, which then hides nothing."""
    policy = steps.policy(pieces=replace(steps.plan.policy.pieces, depth=1))
    times = times_of(steps.regions, ((0.0,),) * 4, 1e-3)
    updates = sum(p.numel for p in policy.pieces) * times.update_us_per_element
    use = steps.clocked(policy, times)
    assert use.step_us == pytest.approx(2 * steps.moved() * 1e-3 + updates)
    assert use.incoming_us == use.outgoing_us == pytest.approx(steps.moved() * 1e-3)
    assert use.still_us == pytest.approx(updates)
    assert use.hidden == 0.0


def test_more_buffers_hide_more(steps: Steps) -> None:
    """States under the backward, or at the step those that leave under those that come."""
    times = times_of(steps.regions, ((50.0,),) * 4, 1e-4)
    found = [
        steps.clocked(steps.policy(pieces=replace(steps.plan.policy.pieces, depth=depth)), times).step_us
        for depth in (1, 3, 12)
    ]
    assert found == sorted(found, reverse=True)
    assert found[0] > found[2]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(cases(), st.booleans())
def test_late_updates_hide_beside_a_forward_and_nothing_else(
    steps: Steps, case: tuple[dict[str, Any], tuple[tuple[float, ...], ...], float, int], is_streamed: bool
) -> None:
    changes, each, per_byte, depth = case
    held = replace(steps.plan.policy.pieces, depth=depth)
    names = frozenset(n for n in steps.session.programs.parameters if ".1." in n) if is_streamed else frozenset()
    waits = steps.policy(pieces=held, streamed=names, in_backward=False, host_gradients=True, **changes)
    times = times_of(steps.regions, each, per_byte)
    at_step, late = (steps.clocked(replace(waits, late=is_late), times) for is_late in (False, True))
    assert [late.incoming_nbytes, late.outgoing_nbytes] == [at_step.incoming_nbytes, at_step.outgoing_nbytes]
    if is_streamed:
        assert late.step_us == at_step.step_us
        return
    # at the step nothing comes or goes while the first piece comes and the last one goes
    ends = 2 * max(piece.nbytes for piece in held) * per_byte
    assert at_step.step_us - sum(times.forward_us) - ends <= late.step_us * (1 + 1e-9)
    assert late.step_us <= at_step.step_us * (1 + 1e-9)
    assert late.step_us >= max(steps.compute(waits, times), late.incoming_us) * (1 - 1e-9)


def test_late_updates_of_the_first_region_are_waited_for(steps: Steps) -> None:
    """A long forward hides all but those."""
    policy = steps.policy(in_backward=False, host_gradients=True, late=True)
    slow = times_of(steps.regions, ((1e6,), (0.0,), (0.0,), (0.0,)), 1e-3)
    at_step = replace(policy, late=False)
    waited = steps.clocked(policy, slow).step_us - steps.regions * 1e6
    assert 0 < waited < 0.5 * (steps.clocked(at_step, slow).step_us - steps.regions * 1e6)


def test_a_plan_tells_what_the_clock_says(steps: Steps) -> None:
    predictor = Predictor(steps.session.programs, absent(steps.session), known=RATES)
    times = predictor.times(steps.plan.chunks[0])
    assert times is not None
    assert predictor.clocked(steps.plan.chunks[0], steps.plan.policy) == steps.clocked(steps.plan.policy, times)
    unknown = Predictor(steps.session.programs, absent(steps.session))
    assert unknown.clocked(steps.plan.chunks[0], steps.plan.policy) is None
    assert unknown.spans(steps.plan.chunks[0], steps.plan.policy) == ()
