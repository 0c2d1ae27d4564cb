"""schedule_states: states come in where no fetch is under way, in a share that fits; broken programs are caught."""

from __future__ import annotations

import operator
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from chunkft_fx.errors import VerificationError
from chunkft_fx.graph import ops
from chunkft_fx.passes.program.insert_streams import InsertStreams
from chunkft_fx.passes.program.schedule_prefetch import SchedulePrefetch
from chunkft_fx.passes.program.schedule_states import ScheduleStates
from chunkft_fx.plan.policy import HIDDEN_SHARE, Policy, StepTimes
from chunkft_fx.predict.step_time import bare_steps
from chunkft_fx.program.verify_streams import verify_streams

CPU = torch.device("cpu")
DEPTH = 2


class Call(nn.Module):
    """Stands for a region call that multiplies by its weight."""

    def __init__(self, is_backward: bool) -> None:
        super().__init__()
        self.is_backward = is_backward

    def forward(self, weight: Tensor, value: Tensor) -> tuple[Tensor]:
        return (weight * value,)


def program(regions: int, streamed: frozenset[int]) -> fx.GraphModule:
    """Every region forward, then backward; those in ``streamed`` fetch their weight for each use."""
    graph, root = fx.Graph(), nn.Module()
    weights = [graph.placeholder(f"weight_{i}") for i in range(regions)]
    for weight in weights:
        weight.meta["parameter"] = weight.name
    value = graph.placeholder("x")
    for region, is_backward in [*((i, False) for i in range(regions)), *((i, True) for i in reversed(range(regions)))]:
        name = f"call_{region}_{is_backward}"
        root.add_module(name, Call(is_backward))
        call = graph.call_module(name, (weights[region], value))
        call.meta["region"] = region
        value = graph.call_function(operator.getitem, (call, 0))
    graph.output(value)
    module = fx.GraphModule(root, graph)
    InsertStreams(names(streamed), CPU, DEPTH)(module)
    SchedulePrefetch()(module)
    module.recompile()
    return module


def names(streamed: frozenset[int]) -> frozenset[str]:
    return frozenset(f"weight_{i}" for i in streamed)


def alike(regions: int, compute: float, fetch: float) -> StepTimes:
    """Regions that take as long as each other, backward twice as long; a microsecond a byte of states."""
    once, twice, never = (compute,) * regions, (2 * compute,) * regions, (0.0,) * regions
    return StepTimes(once, twice, once, never, (fetch,) * regions, never, 1.0, 0.0)


def shares(module: fx.GraphModule) -> list[Any]:
    return [n.args[0] for n in module.graph.nodes if n.target is ops.admit]


def calls_behind(module: fx.GraphModule) -> list[str]:
    """The region calls that admits stand before."""
    nodes = list(module.graph.nodes)
    return [str(after.target) for n, after in pairwise(nodes) if n.target is ops.admit]


sets = st.integers(1, 6).flatmap(lambda n: st.tuples(st.just(n), st.frozensets(st.integers(0, n - 1))))
microseconds = st.sampled_from([0.0, 1.0, 5.0, 12.0])


@given(sets, microseconds, microseconds, st.integers(0, 200), st.integers(0, 6))
def test_random_programs_keep_the_rules_and_their_values(
    made: tuple[int, frozenset[int]], compute: float, fetch: float, nbytes: int, save_from: int
) -> None:
    regions, streamed = made
    inputs = [torch.tensor(float(i + 2)) for i in range(regions + 1)]
    module = program(regions, streamed)
    before = module(*inputs)
    added = ScheduleStates(alike(regions, compute, fetch), save_from, nbytes)(module)
    module.recompile()
    verify_streams(module, Policy(streamed=names(streamed)))
    assert torch.equal(module(*inputs), before)
    assert added == len(shares(module))
    assert (added > 0) == (nbytes > 0)


@given(sets, st.floats(1.0, 12.0), st.floats(0.0, 20.0), st.integers(1, 100))
def test_all_states_are_admitted_within_the_time_that_the_link_is_idle(
    made: tuple[int, frozenset[int]], compute: float, fetch: float, nbytes: int
) -> None:
    regions, streamed = made
    times = alike(regions, compute, fetch)
    module = program(regions, streamed)
    ScheduleStates(times, 0, nbytes)(module)
    bare = bare_steps(times, Policy(0), streamed, DEPTH)
    idle = bare.compute_us[0] - bare.link_us[0]  # what the planner counts on
    assume(HIDDEN_SHARE * idle >= nbytes)
    assert shares(module)[-1] == 1.0
    assert nbytes <= HIDDEN_SHARE * sum(us for _, us in ScheduleStates(times, 0, nbytes)._windows(module)) + 1e-6


odd = st.sampled_from([1e-13, 1e-9, 0.1, 0.3, 1 / 3, 7.7, 1e5])


@given(sets, st.data(), st.integers(1, 10**6), st.integers(0, 6))
def test_idle_time_that_only_rounding_made_breaks_no_rule(
    made: tuple[int, frozenset[int]], data: st.DataObject, nbytes: int, save_from: int
) -> None:
    regions, streamed = made
    forward, backward, again, fetch, keep = (tuple(data.draw(odd) for _ in range(regions)) for _ in range(5))
    times = StepTimes(forward, backward, again, (0.0,) * regions, fetch, keep, 1.0, 0.0)
    module = program(regions, streamed)
    ScheduleStates(times, save_from, nbytes)(module)
    verify_streams(module, Policy(streamed=names(streamed)))
    rises = [b - a for a, b in pairwise([0.0, *shares(module)])]
    assert all(rise >= 1e-3 for rise in rises)
    assert shares(module)[-1] == 1.0


def test_where_nothing_is_fetched_states_come_first() -> None:
    module = program(3, frozenset())
    ScheduleStates(alike(3, 10.0, 0.0), 0, 12)(module)
    assert calls_behind(module) == ["call_0_False", "call_1_False"]
    assert shares(module) == [pytest.approx(8 / 12), 1.0]


def test_states_stand_back_where_the_link_is_busy() -> None:
    module = program(4, frozenset({1, 3}))
    ScheduleStates(alike(4, 10.0, 15.0), 0, 20)(module)
    # both weights are under way from the beginning, for 30 us: while regions 0 and 1 run, and half of 2, which began
    # when the first had come; so are both again when backward begins
    assert calls_behind(module) == ["call_2_False", "call_3_False", "call_3_True", "call_2_True"]
    assert shares(module) == [pytest.approx(us / 20) for us in (4, 12, 16, 20)]


def test_a_step_without_idle_link_admits_all_at_once() -> None:
    module = program(2, frozenset({0, 1}))
    ScheduleStates(alike(2, 0.0, 15.0), 0, 20)(module)
    assert shares(module) == [1.0]


@pytest.mark.parametrize("wrong", [0.0, 0.4, 1.2])
def test_a_share_that_does_not_rise_is_caught(wrong: float) -> None:
    module = program(3, frozenset({1}))
    ScheduleStates(alike(3, 10.0, 5.0), 0, 40)(module)
    last = module.graph.find_nodes(op="call_function", target=ops.admit)[-1]
    assert shares(module)[-2] > 0.4
    last.args = (wrong,)
    with pytest.raises(VerificationError, match="admits the share"):
        verify_streams(module, Policy(streamed=names(frozenset({1}))))
