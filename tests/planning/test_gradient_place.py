"""Where gradients of all parameters wait for the step: on the device if they fit there, or where a step takes less."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import chunkft_fx
from chunkft_fx.errors import BudgetInfeasible
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.plan.chunk import Chunk
from chunkft_fx.plan.pieces import waiting_nbytes
from chunkft_fx.plan.plan import Plan
from chunkft_fx.plan.policy import Policy, StepTimes
from chunkft_fx.plan.state_spec import ASSUMED, StateSpec, stage_capacity_nbytes
from chunkft_fx.planning.planner import Options, plan_again, plan_for_batch
from chunkft_fx.predict.fixed_memory import RING_OF_GRADIENTS
from chunkft_fx.predict.step_memory import Moment
from chunkft_fx.predict.step_time import Work, covering_step_us
from tests.planning.test_search import Blocks, Predicted
from tests.support.forced_splits import unsplit

MODEL = Blocks(4, 64)
SIZE = sum(p.numel() for p in MODEL.parameters()) * 4


class Moving(Predicted):
    """Gradients take their time to host memory and back; a step makes none beside those that are planned for."""

    def peak(self, chunk: Chunk, saving: Policy) -> Moment:
        moment = super().peak(chunk, saving)
        return Moment(moment.label, {name: n for name, n in moment.terms.items() if name != "gradients"})

    def times(self, deepest: Chunk) -> StepTimes | None:
        times = super().times(deepest)
        return None if times is None else replace(times, leave_us=80.0, return_us=60.0)


def predicted(has_times: bool) -> Moving:
    return Moving(MODEL, 40_000, 3_000, 1_000, has_times)


def planned(budget: int, has_times: bool = False, spec: StateSpec = ASSUMED) -> Plan:
    options = Options(budget, "auto", "sequential", 1, 0, coverage="all")
    return plan_for_batch(MODEL, options, None, predicted(has_times), "a batch", spec)


def least_nbytes() -> int:
    """The smallest budget that is enough."""
    with pytest.raises(BudgetInfeasible) as refused:
        planned(1)
    return refused.value.smallest_budget_bytes


@given(st.integers(0, 1_000_000))
def test_gradients_wait_on_the_device_if_they_fit(more: int) -> None:
    budget = least_nbytes() + more
    plan = planned(budget)
    terms = dict(plan.terms)
    policy = plan.policy
    assert plan.predicted_peak_bytes == sum(terms.values()) <= budget
    if policy.host_gradients:
        ring = policy.pieces.depth * waiting_nbytes(policy.pieces, dict(MODEL.named_parameters()))
        assert terms[RING_OF_GRADIENTS] == ring
        assert terms["gradients"] == max(p.numel for p in policy.pieces) * 4
        assert dict(plan.host_terms)["gradients"] == SIZE
        assert "gradients wait for the step in host memory" in str(plan)
    else:
        assert terms["gradients"] == SIZE
        assert "gradients" not in dict(plan.host_terms)
    assert dict(plan.host_terms)["optimizer states"] == sum(
        stage_capacity_nbytes(c, dict(MODEL.named_parameters())) for c in plan.chunks
    )
    assert "host memory" in str(plan)


def test_both_places_are_taken_and_the_least_needs_the_host() -> None:
    least = least_nbytes()
    assert planned(least).policy.host_gradients
    assert not planned(least + 10 * SIZE).policy.host_gradients
    assert not planned(least + SIZE, spec=replace(ASSUMED, updates="backward")).policy.host_gradients


@given(st.integers(0, 1_000_000))
def test_where_times_are_known_the_faster_place_is_taken(more: int) -> None:
    budget = least_nbytes() + more
    plan = planned(budget, has_times=True)
    assert plan.predicted_peak_bytes is not None
    assert plan.predicted_peak_bytes <= budget
    assert plan.predicted_step_us is not None
    larger = planned(budget + 100_000, has_times=True)
    assert larger.predicted_step_us is not None
    assert larger.predicted_step_us <= plan.predicted_step_us + 1e-6
    if plan.policy.host_gradients:  # on the device it would have to stream or recompute more, or does not fit
        considered = [c for c in plan.considered if not c.policy.host_gradients and c.nbytes <= budget]
        assert all(c.step_us is None or c.step_us > plan.predicted_step_us for c in considered)


def test_another_batch_keeps_the_place() -> None:
    budget = least_nbytes()
    known = planned(budget)
    assert known.policy.host_gradients
    options = Options(budget + 10 * SIZE, "auto", "sequential", 1, 0, coverage="all")
    assert plan_again(MODEL, options, known, predicted(False), "another", ASSUMED).policy.host_gradients


def test_explain_tells_where_gradients_of_other_choices_would_wait() -> None:
    text = planned(least_nbytes() + SIZE // 2).explain()
    assert "gradients" in text
    assert "host" in text
    assert "device" in text


@given(st.lists(st.floats(1.0, 100.0), min_size=2, max_size=5), st.floats(0, 1_000), st.floats(0, 1_000))
def test_gradients_leave_under_the_backward_and_come_back_with_the_states(
    us: list[float], leave: float, back: float
) -> None:
    zero = (0.0,) * len(us)
    times = StepTimes(tuple(us), tuple(us), zero, zero, zero, zero, 0.0, 0.0, leave_us=leave, return_us=back)
    waits = planned(least_nbytes()).policy
    at_step = covering_step_us(times, replace(waits, host_gradients=False), frozenset(), Work(0, 0.0, 50.0))
    found = covering_step_us(times, replace(waits, streamed=frozenset()), frozenset(), Work(0, 0.0, 50.0))
    assert found == pytest.approx(max(2 * sum(us), sum(us) + leave) + 50 + back)
    assert found >= at_step + back - 1e-9


@given(st.lists(st.floats(1.0, 100.0), min_size=2, max_size=5), st.floats(0, 1_000), st.floats(0, 1_000))
def test_late_updates_take_what_the_next_forward_does_not_hide(us: list[float], leave: float, back: float) -> None:
    zero = (0.0,) * len(us)
    times = StepTimes(tuple(us), tuple(us), zero, zero, zero, zero, 0.0, 0.0, leave_us=leave, return_us=back)
    late = replace(planned(least_nbytes()).policy, streamed=frozenset(), late=True)
    at_step = covering_step_us(times, replace(late, late=False), frozenset(), Work(0, 0.0, 50.0))
    found = covering_step_us(times, late, frozenset(), Work(0, 0.0, 50.0))
    assert found == pytest.approx(at_step - min(sum(us), 50 + back))
    assert covering_step_us(times, late, frozenset({0}), Work(0, 0.0, 50.0)) >= at_step  # behind fetched weights


def test_updates_are_late_where_the_optimizer_asks_for_it_and_gradients_wait_in_host_memory() -> None:
    spec = replace(ASSUMED, updates="late")
    waits, stay = planned(least_nbytes(), spec=spec).policy, planned(least_nbytes() + 10 * SIZE, spec=spec).policy
    assert waits.host_gradients and waits.late and not waits.in_backward
    assert waits.updates_late == (not waits.streamed)
    assert not stay.host_gradients and not stay.late
    assert any("as far as the next forward" in s for s in replace(waits, streamed=frozenset()).sentences())
    assert not planned(least_nbytes()).policy.late


class Layers(nn.Module):
    """Layers whose gradients are most of what a step needs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(128, 128, bias=False) for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x.square().mean()


def trained(budget: int) -> tuple[CompiledModule, Sequence[torch.Tensor]]:
    torch.manual_seed(0)
    model = chunkft_fx.compile(Layers(), budget, coverage="all", backend="eager")
    assert isinstance(model, CompiledModule)
    optimizer = chunkft_fx.AdamW(model, lr=1e-2, max_grad_norm=0.1)
    for step in range(3):
        model(torch.full((2, 128), 0.1 * (step + 1))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, [p.detach() for p in model.parameters()]


def test_a_real_model_trains_the_same_under_the_smallest_budget() -> None:
    with unsplit(), pytest.raises(BudgetInfeasible) as refused:
        trained(1)
    small, ours = trained(refused.value.smallest_budget_bytes)
    large, theirs = trained(10**9)
    assert small.plan.policy.host_gradients
    assert not large.plan.policy.host_gradients
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert isinstance(small.plan.policy, Policy)
