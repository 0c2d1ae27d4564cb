"""insert_streams and schedule_prefetch keep the verifier's rules for random programs; broken programs are caught."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from chunkft_fx.errors import VerificationError
from chunkft_fx.graph import ops
from chunkft_fx.passes.program.insert_streams import InsertStreams
from chunkft_fx.passes.program.schedule_prefetch import SchedulePrefetch
from chunkft_fx.plan.policy import Policy
from chunkft_fx.program.verify_streams import verify_streams

CPU = torch.device("cpu")
WEIGHTS = 5


class Call(nn.Module):
    """Stands for a region call: a value made of everything that it reads."""

    def __init__(self, is_backward: bool) -> None:
        super().__init__()
        self.is_backward = is_backward

    def forward(self, *values: Tensor) -> tuple[Tensor]:
        total = torch.zeros(())
        for i, value in enumerate(values):
            total = total * 0.5 + value.sum() * (i + 1)
        return (total,)


def program(forward: list[list[int]], backward: list[list[int]]) -> fx.GraphModule:
    """A chain of calls; each list holds the weights that a call reads."""
    graph, root = fx.Graph(), nn.Module()
    weights = [graph.placeholder(f"weight_{i}") for i in range(WEIGHTS)]
    for weight in weights:
        weight.meta["parameter"] = weight.name
    value = graph.placeholder("x")
    for part, calls in enumerate((forward, backward)):
        for i, reads in enumerate(calls):
            name = f"part_{part}_{i}"
            root.add_module(name, Call(bool(part)))
            call = graph.call_module(name, (*(weights[w] for w in reads), value))
            value = graph.call_function(operator.getitem, (call, 0))
    graph.output(value)
    return fx.GraphModule(root, graph)


calls = st.lists(st.lists(st.integers(0, WEIGHTS - 1), max_size=3), min_size=1, max_size=6)
some = st.frozensets(st.sampled_from([f"weight_{i}" for i in range(WEIGHTS)]))
INPUTS = [torch.arange(1.0, 4.0) * (i + 1) for i in range(WEIGHTS)] + [torch.ones(2)]


def streamed(forward: list[list[int]], backward: list[list[int]], names: frozenset[str], depth: int) -> fx.GraphModule:
    module = program(forward, backward)
    InsertStreams(names, CPU, depth)(module)
    SchedulePrefetch()(module)
    module.recompile()
    return module


@given(calls, calls, some, st.integers(1, 4))
def test_random_programs_keep_the_rules_and_their_values(
    forward: list[list[int]], backward: list[list[int]], names: frozenset[str], depth: int
) -> None:
    module = streamed(forward, backward, names, depth)
    verify_streams(module, Policy(streamed=names, depth=depth))
    assert torch.equal(module(*INPUTS), program(forward, backward)(*INPUTS))


@given(calls, calls, some, st.integers(1, 4))
def test_every_use_is_fetched_once(
    forward: list[list[int]], backward: list[list[int]], names: frozenset[str], depth: int
) -> None:
    uses = sum(any(f"weight_{w}" in names for w in reads) for reads in [*forward, *backward])
    assert InsertStreams(names, CPU, depth)(program(forward, backward)) == uses


def test_fetches_run_ahead_by_the_depth_of_the_ring() -> None:
    module = streamed([[0], [1], [2]], [[2]], frozenset(f"weight_{i}" for i in range(3)), 2)
    order = [n.target if n.op == "call_module" else n.target.name() for n in module.graph.nodes if _is_step(n)]
    fetch, wait, release = (op.name() for op in (ops.fetch, ops.wait, ops.release))
    assert order == [
        *(fetch, fetch, wait, "part_0_0", release, fetch, wait, "part_0_1", release, wait, "part_0_2", release),
        *(fetch, wait, "part_1_0", release),
    ]  # fmt: skip


def _is_step(node: fx.Node) -> bool:
    return node.op == "call_module" or node.target in ops.STREAM_NODES


def _nodes(module: fx.GraphModule, target: Any) -> list[fx.Node]:
    return [n for n in module.graph.nodes if n.target is target]


def _drop_wait(m: fx.GraphModule) -> None:
    m.graph.erase_node(_nodes(m, ops.wait)[1])


def _wait_late(m: fx.GraphModule) -> None:
    wait = _nodes(m, ops.wait)[0]
    m.graph.find_nodes(op="call_module")[0].append(wait)


def _drop_release(m: fx.GraphModule) -> None:
    m.graph.erase_node(_nodes(m, ops.release)[-1])


def _release_early(m: fx.GraphModule) -> None:
    m.graph.find_nodes(op="call_module")[1].prepend(_nodes(m, ops.release)[1])


def _release_twice(m: fx.GraphModule) -> None:
    release = _nodes(m, ops.release)[0]
    with m.graph.inserting_after(release):
        m.graph.call_function(ops.release, release.args)


def _fetch_early(m: fx.GraphModule) -> None:
    fetch = _nodes(m, ops.fetch)[2]
    first = _nodes(m, ops.wait)[0]
    for node in (fetch, *list(fetch.users)):
        if node.target is ops.fetch or node.target is operator.getitem:
            first.prepend(node)


def _same_buffer(m: fx.GraphModule) -> None:
    fetch = _nodes(m, ops.fetch)[1]
    fetch.args = (*fetch.args[:2], 0)


def _no_such_buffer(m: fx.GraphModule) -> None:
    fetch = _nodes(m, ops.fetch)[1]
    fetch.args = (*fetch.args[:2], 7)


def _read_host(m: fx.GraphModule) -> None:
    call = m.graph.find_nodes(op="call_module")[2]
    call.args = (m.graph.find_nodes(op="placeholder")[0], *call.args[1:])


def _wait_for_part(m: fx.GraphModule) -> None:
    wait = _nodes(m, ops.wait)[0]
    copies: Any = wait.args[0]
    wait.args = ([copies[0]],)


def _hold_over_the_border(m: fx.GraphModule) -> None:
    last = _nodes(m, ops.release)[2]
    backward = next(n for n in m.graph.nodes if n.op == "call_module" and n.target == "part_1_0")
    backward.append(last)


@pytest.mark.parametrize(
    ("mutate", "rule"),
    [
        (_drop_wait, "before it was waited for"),
        (_wait_late, "before it was waited for"),
        (_drop_release, "never released"),
        (_release_early, "after its release"),
        (_release_twice, "not ready"),
        (_fetch_early, "overwrites buffer"),
        (_same_buffer, "overwrites buffer"),
        (_no_such_buffer, "buffer 7 of 2"),
        (_read_host, "from host memory"),
        (_wait_for_part, "does not name all copies"),
        (_hold_over_the_border, "(beyond the forward part|overwrites buffer)"),
    ],
)
def test_broken_programs_are_caught(mutate: Any, rule: str) -> None:
    names = frozenset(f"weight_{i}" for i in range(WEIGHTS))
    module = streamed([[0, 1], [1], [2]], [[2], [0, 1]], names, 2)
    verify_streams(module, Policy(streamed=names))
    mutate(module)
    with pytest.raises(VerificationError, match=rule):
        verify_streams(module, Policy(streamed=names))
