"""offload_saved: random programs stay right under the worst timing of their copies; broken programs are caught."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from chunkft_fx.errors import VerificationError
from chunkft_fx.graph import ops
from chunkft_fx.passes.program import offload_saved
from chunkft_fx.passes.program.insert_streams import InsertStreams
from chunkft_fx.passes.program.offload_saved import OffloadSaved
from chunkft_fx.passes.program.schedule_prefetch import SchedulePrefetch
from chunkft_fx.plan.policy import Policy
from chunkft_fx.program.verify_streams import verify_streams

CPU = torch.device("cpu")
WEIGHTS = [f"weight_{i}" for i in range(3)]
INPUTS = [torch.arange(1.0, 4.0) * (i + 1) for i in range(len(WEIGHTS))] + [torch.ones(2)]


class Call(nn.Module):
    """Stands for a region call: values of the given sizes made of everything that it reads."""

    def __init__(self, is_backward: bool, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.is_backward = is_backward
        self.sizes = sizes

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        total = torch.zeros(())
        for i, value in enumerate(values):
            total = total * 0.5 + value.sum() * (i + 1)
        return tuple(total * 0.1 + torch.arange(size) + i for i, size in enumerate(self.sizes))


@dataclass(frozen=True)
class Region:
    """What a region's calls read, as (region, item) of results made before, and the elements of its own results.

    The first result goes on to the next region. ``kept`` is what backward reads, ``given`` what the caller gets.
    """

    sizes: tuple[int, ...]
    weights: tuple[str, ...]
    reads: frozenset[tuple[int, int]]
    kept: frozenset[tuple[int, int]]
    given: frozenset[int]


@st.composite
def models(draw: Callable[..., Any]) -> list[Region]:
    """Up to six regions that read results of any region before."""
    regions: list[Region] = []
    items: list[tuple[int, int]] = []
    for index in range(draw(st.integers(1, 6))):
        sizes = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
        before = list(items)
        items += [(index, i) for i in range(len(sizes))]
        regions.append(
            Region(
                sizes,
                tuple(draw(st.lists(st.sampled_from(WEIGHTS), unique=True, max_size=2))),
                frozenset(draw(st.lists(st.sampled_from(before), max_size=2))) if before else frozenset(),
                frozenset(draw(st.lists(st.sampled_from(items[-5:]), max_size=3))),
                frozenset(draw(st.lists(st.sampled_from(range(len(sizes))), max_size=1))),
            )
        )
    return regions


def program(regions: list[Region], lowest: int) -> fx.GraphModule:
    """Forward calls of all regions, then backward calls down to ``lowest``, as `program.program` writes them."""
    graph, root = fx.Graph(), nn.Module()
    env: dict[Any, fx.Node] = {name: graph.placeholder(name) for name in WEIGHTS}
    for name in WEIGHTS:
        env[name].meta["parameter"] = name
    calls: dict[int, fx.Node] = {}

    def call(index: int, is_backward: bool, reads: frozenset[tuple[int, int]], sizes: tuple[int, ...]) -> fx.Node:
        arguments = [item(*read) for read in sorted(reads)]
        name = f"{'backward' if is_backward else 'forward'}_{index}"
        root.add_module(name, Call(is_backward, sizes))
        node = graph.call_module(name, (*(env[w] for w in regions[index].weights), *arguments, env["x"]))
        node.meta["region"] = index
        return node

    def item(index: int, i: int) -> fx.Node:
        """A result of a forward call, taken from it where it is first read."""
        if (index, i) not in env:
            env[index, i] = _item(graph, calls[index], i)
            env[index, i].meta["val"] = torch.empty(regions[index].sizes[i])
        return env[index, i]

    env["x"] = graph.placeholder("x")
    for index, region in enumerate(regions):
        calls[index] = call(index, False, region.reads, region.sizes)
        env["x"] = item(index, 0)
    outputs = [item(index, i) for index, region in enumerate(regions) for i in sorted(region.given)]
    for index in reversed(range(lowest, len(regions))):
        env["x"] = _item(graph, call(index, True, regions[index].kept, (2,)), 0)
    graph.output((outputs, env["x"]))
    return fx.GraphModule(root, graph)


def _item(graph: fx.Graph, call: fx.Node, index: int) -> fx.Node:
    getitem: Callable[..., Any] = operator.getitem
    return graph.call_function(getitem, (call, index))


class LateCopies(fx.Interpreter):
    """Runs a program as if every copy ended at the last moment that is allowed, and freed memory were used at once."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.under_way: list[tuple[Tensor, Tensor]] = []

    def run_node(self, n: fx.Node) -> Any:
        args, _ = self.fetch_args_kwargs_from_env(n)
        if n.target in (ops.offload, ops.fetch):
            pending = [torch.full_like(t, torch.nan) for t in args[0]]
            self.under_way += zip(args[0], pending, strict=True)
            return pending
        if n.target is ops.wait:
            self._end(args[0], 1)
            return None
        if n.target is ops.release:
            self._end(args[0], 0)
            for value in args[0]:
                value.fill_(torch.nan)
            return None
        return super().run_node(n)

    def _end(self, named: list[Tensor], side: int) -> None:
        for copy in self.under_way:
            if any(copy[side] is t for t in named):
                copy[1].copy_(copy[0])


def streamed(
    regions: list[Region], lowest: int, below: int, names: frozenset[str], smallest: int = 0
) -> fx.GraphModule:
    module = program(regions, lowest)
    OffloadSaved(below, CPU, smallest)(module)
    InsertStreams(names, CPU, 2)(module)
    SchedulePrefetch()(module)
    module.recompile()
    return module


borders = st.integers(0, 6)
some = st.frozensets(st.sampled_from(WEIGHTS))


@given(models(), borders, borders, some)
def test_random_programs_keep_the_rules_and_their_values(
    regions: list[Region], lowest: int, below: int, names: frozenset[str]
) -> None:
    module = streamed(regions, lowest, below, names)
    verify_streams(module, Policy(streamed=names))
    wanted = program(regions, lowest)(*INPUTS)
    for run in (module, LateCopies(module).run):
        outputs, last = run(*(t.clone() for t in INPUTS))
        assert all(map(torch.equal, [*outputs, last], [*wanted[0], wanted[1]]))


@given(models(), borders, borders, st.integers(0, 6))
def test_what_only_early_backwards_read_goes_and_comes_once(
    regions: list[Region], lowest: int, below: int, elements: int
) -> None:
    last = len(regions) - 1
    readers: dict[tuple[int, int], set[int]] = {}
    for index in range(lowest, len(regions)):
        for read in regions[index].kept:
            readers.setdefault(read, set()).add(index)
    if lowest <= last:
        readers.setdefault((last, 0), set()).add(last)  # the chain of values goes on into the first backward call
    expected = 0
    for (index, i), found in readers.items():
        is_near = max(found) < below and max(found) - min(found) <= 1
        released = max([index + 1, *(r for r in range(index, last + 1) if (index, i) in regions[r].reads)])
        fetched = last - max(found) - 1  # how many backward calls have run
        if released >= last and fetched <= 0:
            continue  # no call would run without it
        expected += is_near and i not in regions[index].given and regions[index].sizes[i] >= elements
    module = program(regions, lowest)
    assert OffloadSaved(below, CPU, smallest=elements * 4)(module) == expected
    hosts = [u for n in module.graph.nodes if n.target is ops.offload for u in n.users]
    assert len(hosts) == expected
    for host in hosts:
        assert [user.target for user in host.users] == [ops.fetch]


CHAIN = [
    Region((4,), ("weight_0",), frozenset(), frozenset({(0, 0)}), frozenset()),
    Region((4, 4), ("weight_1",), frozenset(), frozenset({(0, 0), (1, 1)}), frozenset()),
    Region((4,), (), frozenset(), frozenset({(1, 0)}), frozenset()),
    Region((4,), (), frozenset(), frozenset(), frozenset()),
    Region((4,), (), frozenset(), frozenset({(3, 0)}), frozenset({0})),
]


def test_values_leave_a_call_later_and_come_back_a_call_ahead() -> None:
    module = streamed(CHAIN, 0, 3, frozenset())
    order = [
        n.target if n.op == "call_module" else f"{n.target.name().removeprefix('chunkft_fx::')} {len(n.args[0])}"
        for n in module.graph.nodes
        if n.op == "call_module" or n.target in ops.STREAM_NODES
    ]
    assert order == [
        *("forward_0", "offload 1", "forward_1", "offload 2", "release 1", "forward_2", "release 2"),
        *("forward_3", "forward_4", "backward_4"),
        *("fetch 1", "backward_3", "wait 1", "fetch 2", "backward_2", "wait 2", "backward_1", "backward_0"),
    ]  # fmt: skip


def test_a_value_that_two_neighbours_read_is_fetched_once() -> None:
    module = streamed(CHAIN, 0, 3, frozenset())
    (fetch,) = [n for n in _nodes(module, ops.fetch) if len(n.all_input_nodes) == 2]
    readers = [{u.target for u in copy.users if u.op == "call_module"} for copy in fetch.users]
    assert {"backward_1", "backward_0"} in readers


@pytest.mark.parametrize(
    "held",
    [torch.empty(4, device="meta"), torch.empty(8)[::2], torch.empty(1).expand(4), None, 4],
    ids=["another device", "gaps", "expanded", "nothing known", "a number"],
)
def test_a_value_stays_that_is(held: Any) -> None:
    module = program(CHAIN, 0)
    for node in module.graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = held
    assert OffloadSaved(3, CPU, 0)(module) == 0


def test_the_smallest_size_is_a_constant_of_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    assert OffloadSaved(3, CPU)(program(CHAIN, 0)) == 0
    monkeypatch.setattr(offload_saved, "SMALLEST_NBYTES", 16)
    assert OffloadSaved(3, CPU)(program(CHAIN, 0)) == 3


def _nodes(module: fx.GraphModule, target: Any) -> list[fx.Node]:
    return [n for n in module.graph.nodes if n.target is target]


def _named(module: fx.GraphModule, name: str) -> fx.Node:
    return next(n for n in module.graph.nodes if n.target == name)


def _again(m: fx.GraphModule, target: Any, after: fx.Node | None = None) -> fx.Node:
    """A stream node a second time, behind ``after`` or itself."""
    node = _nodes(m, target)[-1]
    with m.graph.inserting_after(after or node):
        copied = m.graph.call_function(target, node.args)
    copied.meta["part"] = node.meta["part"]
    return copied


def _offload_twice(m: fx.GraphModule) -> None:
    _again(m, ops.offload)


def _offload_in_backward(m: fx.GraphModule) -> None:
    _again(m, ops.offload, _named(m, "backward_2"))


def _offload_a_weight(m: fx.GraphModule) -> None:
    _nodes(m, ops.offload)[0].args = ([_named(m, "weight_0")],)


def _drop_release(m: fx.GraphModule) -> None:
    m.graph.erase_node(_nodes(m, ops.release)[-1])


def _release_in_backward(m: fx.GraphModule) -> None:
    _named(m, "backward_4").append(_nodes(m, ops.release)[-1])


def _release_early(m: fx.GraphModule) -> None:
    _named(m, "forward_1").prepend(_nodes(m, ops.release)[0])


def _release_twice(m: fx.GraphModule) -> None:
    _again(m, ops.release)


def _release_another(m: fx.GraphModule) -> None:
    release = _nodes(m, ops.release)[0]
    release.args = ([_item_of(m, "forward_2", 0)],)


def _release_before_the_offload(m: fx.GraphModule) -> None:
    _nodes(m, ops.offload)[0].prepend(_nodes(m, ops.release)[0])


def _release_of_two(m: fx.GraphModule) -> None:
    first, second = _nodes(m, ops.release)
    second.args = ([*first.all_input_nodes, *second.all_input_nodes],)
    m.graph.erase_node(first)


def _use_after_release(m: fx.GraphModule) -> None:
    _named(m, "backward_1").args = (_item_of(m, "forward_0", 0),)


def _give_what_was_released(m: fx.GraphModule) -> None:
    m.graph.output_node().args = ((_item_of(m, "forward_0", 0),),)


def _read_the_host_copy(m: fx.GraphModule) -> None:
    _named(m, "backward_1").args = (next(iter(_nodes(m, ops.offload)[0].users)),)


def _give_the_host_copy(m: fx.GraphModule) -> None:
    m.graph.output_node().args = ((next(iter(_nodes(m, ops.offload)[0].users)),),)


def _fetch_early(m: fx.GraphModule) -> None:
    fetch = _nodes(m, ops.fetch)[0]
    _nodes(m, ops.release)[-1].prepend(fetch)


def _fetch_in_forward(m: fx.GraphModule) -> None:
    _nodes(m, ops.fetch)[0].meta["part"] = "forward"


def _fetch_twice(m: fx.GraphModule) -> None:
    _again(m, ops.fetch)


def _fetch_a_weight(m: fx.GraphModule) -> None:
    fetch = _nodes(m, ops.fetch)[0]
    fetch.args = ([_named(m, "weight_0")], *fetch.args[1:])


def _fetch_into_the_ring(m: fx.GraphModule) -> None:
    fetch = _nodes(m, ops.fetch)[0]
    fetch.args = (*fetch.args[:2], 0)


def _drop_wait(m: fx.GraphModule) -> None:
    m.graph.erase_node(_nodes(m, ops.wait)[-1])


def _drop_wait_and_use(m: fx.GraphModule) -> None:
    _drop_wait(m)
    _named(m, "backward_1").args = _named(m, "backward_0").args = (_named(m, "x"),)


def _wait_late(m: fx.GraphModule) -> None:
    _named(m, "backward_1").append(_nodes(m, ops.wait)[-1])


def _wait_twice(m: fx.GraphModule) -> None:
    _again(m, ops.wait)


def _wait_early(m: fx.GraphModule) -> None:
    _nodes(m, ops.fetch)[1].prepend(_nodes(m, ops.wait)[1])


def _wait_for_part(m: fx.GraphModule) -> None:
    wait = _nodes(m, ops.wait)[-1]
    wait.args = (wait.all_input_nodes[:1],)


def _release_a_copy(m: fx.GraphModule) -> None:
    wait = _nodes(m, ops.wait)[-1]
    with m.graph.inserting_after(_named(m, "backward_0")):
        m.graph.call_function(ops.release, wait.args)


def _item_of(m: fx.GraphModule, call: str, index: int) -> fx.Node:
    return next(u for u in _named(m, call).users if u.args[1] == index)


@pytest.mark.parametrize(
    ("mutate", "rule"),
    [
        (_offload_twice, "offloads .* a second time"),
        (_offload_in_backward, "does not belong to the forward part"),
        (_offload_a_weight, "which no region call made"),
        (_drop_release, "on the device beyond the forward part"),
        (_release_in_backward, "on the device beyond the forward part"),
        (_release_early, "uses .* after its release"),
        (_release_twice, "releases .* a second time"),
        (_release_another, "which was not offloaded"),
        (_release_before_the_offload, "which was not offloaded"),
        (_release_of_two, "values of several offloads"),
        (_use_after_release, "uses .* after its release"),
        (_give_what_was_released, "uses .* after its release"),
        (_read_the_host_copy, "from host memory"),
        (_give_the_host_copy, "from host memory"),
        (_fetch_early, "before .* was released"),
        (_fetch_in_forward, "does not belong to the backward part"),
        (_fetch_twice, "fetches .* a second time"),
        (_fetch_a_weight, "which was not offloaded"),
        (_fetch_into_the_ring, "fetches what is not in host memory"),
        (_drop_wait, "before it was waited for"),
        (_drop_wait_and_use, "never waited for"),
        (_wait_late, "before it was waited for"),
        (_wait_twice, "waits for .* a second time"),
        (_wait_early, "not under way"),
        (_wait_for_part, "does not name all copies"),
        (_release_a_copy, "which holds no buffer"),
    ],
)
def test_broken_programs_are_caught(mutate: Any, rule: str) -> None:
    module = streamed(CHAIN, 0, 3, frozenset())
    verify_streams(module, Policy())
    mutate(module)
    with pytest.raises(VerificationError, match=rule):
        verify_streams(module, Policy())
