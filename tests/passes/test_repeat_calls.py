"""repeat_calls: random programs do for micro-batches what they do for each in turn; broken programs are caught."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from chunkft_fx.errors import UnsupportedGraph, VerificationError
from chunkft_fx.graph import ops
from chunkft_fx.passes.program.insert_streams import InsertStreams
from chunkft_fx.passes.program.insert_updates import InsertUpdates
from chunkft_fx.passes.program.repeat_calls import RepeatCalls
from chunkft_fx.passes.program.schedule_prefetch import SchedulePrefetch
from chunkft_fx.plan.chunk import Chunk, Slice
from chunkft_fx.plan.pieces import Pieces
from chunkft_fx.plan.policy import Policy
from chunkft_fx.program.verify_streams import verify_streams

WEIGHTS = 3
Inputs = list[Tensor]


class Call(nn.Module):
    """Stands for a region call: values made of everything that it reads."""

    def __init__(self, is_backward: bool, results: int) -> None:
        super().__init__()
        self.is_backward, self.results = is_backward, results

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        total = torch.zeros((), dtype=torch.float64)
        for i, value in enumerate(values):
            total = torch.sin(total * 0.5 + value.sum() * (i + 1))
        return tuple(total * (i + 1) for i in range(self.results))


def program(reads: list[list[int]], writer: int | None = None, reader: int | None = None) -> fx.GraphModule:
    """Regions that read weights, in a chain, forward and back; one writes a buffer that another (or it) reads."""
    graph, root = fx.Graph(), nn.Module()
    getitem: Any = operator.getitem
    weights = [graph.placeholder(f"weight_{i}") for i in range(WEIGHTS)]
    buffer, x, tangent = (graph.placeholder(name) for name in ("buffer", "x", "tangent"))
    for weight in weights:
        weight.meta["parameter"] = weight.name
    for own in (x, tangent):
        own.meta["is_own"] = True
    if writer is not None:
        buffer.meta["mutation"] = 0
    inputs, value, mutations = [], x, []
    for i, taken in enumerate(reads):
        root.add_module(f"forward_{i}", Call(False, 2))
        seen = (buffer,) if i == reader else ()
        call = graph.call_module(f"forward_{i}", (*(weights[w] for w in taken), *seen, value))
        inputs.append((*seen, value))
        value = graph.call_function(getitem, (call, 0))
        if i == writer:
            mutations.append(graph.call_function(getitem, (call, 1)))
    output, gradients = value, []
    value = tangent
    for i, taken in reversed(list(enumerate(reads))):
        root.add_module(f"backward_{i}", Call(True, 1 + len(taken)))
        call = graph.call_module(f"backward_{i}", (*(weights[w] for w in taken), *inputs[i], value))
        value = graph.call_function(getitem, (call, 0))
        for at, w in enumerate(taken):
            gradient = graph.call_function(getitem, (call, at + 1))
            gradient.meta["gradient_of"] = weights[w].name
            gradients.append(gradient)
    graph.output(((output, buffer if reader is not None else 1), tuple(mutations), tuple(gradients)))
    return fx.GraphModule(root, graph)


regions = st.lists(st.lists(st.integers(0, WEIGHTS - 1), max_size=3, unique=True), min_size=1, max_size=5)
SHARED = [torch.arange(1.0, 4.0, dtype=torch.float64) * (i + 1) for i in range(WEIGHTS)]
BUFFER = torch.tensor(0.25, dtype=torch.float64)


def micro_batch(seed: int) -> tuple[Tensor, Tensor]:
    x, tangent = torch.rand(2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x, tangent


@given(regions, st.integers(1, 4), st.data())
def test_micro_batches_are_those_in_turn(reads: list[list[int]], count: int, data: st.DataObject) -> None:
    writer = data.draw(st.none() | st.integers(0, len(reads) - 1))
    reader = data.draw(st.none() | st.integers(writer or 0, len(reads) - 1))
    given_each = [micro_batch(i) for i in range(count)]
    one, together = program(reads, writer, reader), program(reads, writer, reader)
    added = RepeatCalls(count)(together)
    together.recompile()
    assert added == (count - 1) * 2 * len(reads)
    verify_streams(together, Policy())
    outputs, buffer, totals = [], BUFFER, [torch.zeros(())] * sum(map(len, reads))
    for x, tangent in given_each:
        (value, seen), mutations, gradients = one(*SHARED, buffer, x, tangent)
        outputs += [value, seen]
        totals = [t + g for t, g in zip(totals, gradients, strict=True)]
        buffer = mutations[0] if mutations else buffer
    xs, tangents = zip(*given_each, strict=True)
    found, mutations, gradients = together(*SHARED, BUFFER, *xs, *tangents)
    torch.testing.assert_close([*map(torch.as_tensor, found)], [*map(torch.as_tensor, outputs)], rtol=0, atol=0)
    torch.testing.assert_close(list(gradients), totals, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(m, buffer) for m in mutations)


@given(regions, st.integers(1, 4), st.integers(1, 3))
def test_weights_are_fetched_once_a_group_and_updated_behind_the_last(
    reads: list[list[int]], count: int, depth: int
) -> None:
    names = frozenset(f"weight_{w}" for w in range(WEIGHTS))
    pieces = Pieces(tuple(Chunk((Slice(n, 0, 0, 3, 3),), 3, 24) for n in sorted(names)))
    policy = Policy(streamed=names, depth=depth, pieces=pieces, in_backward=True)
    module = program(reads)
    RepeatCalls(count)(module)
    updates = InsertUpdates(pieces)(module)
    fetches = InsertStreams(names, torch.device("cpu"), depth)(module)
    SchedulePrefetch()(module)
    verify_streams(module, policy)
    used = {w for taken in reads for w in taken}
    assert updates == len(used)
    assert fetches == 2 * sum(bool(taken) for taken in reads)
    sums = module.graph.find_nodes(op="call_function", target=ops.add_up)
    assert len(sums) == (count - 1) * sum(map(len, reads))


def test_a_buffer_that_an_earlier_region_reads_is_refused() -> None:
    with pytest.raises(UnsupportedGraph, match=r"'buffer'.*later region"):
        RepeatCalls(2)(program([[0], [1]], writer=1, reader=0))


def _read_twice(module: fx.GraphModule) -> None:
    add = next(iter(module.graph.find_nodes(op="call_function", target=ops.add_up)))
    total: Any = add.args[0]
    output = module.graph.output_node()
    results: Any = output.args[0]
    output.args = ((results[0], results[1], (*results[2], total[0])),)


def _weight_added(module: fx.GraphModule) -> None:
    add = next(iter(module.graph.find_nodes(op="call_function", target=ops.add_up)))
    total: Any = add.args[0]
    add.args = ([total[0], next(iter(module.graph.nodes))],)


def _in_forward(module: fx.GraphModule) -> None:
    next(iter(module.graph.find_nodes(op="call_function", target=ops.add_up))).meta["part"] = "forward"


def _behind_the_update(module: fx.GraphModule) -> None:
    """Another sum of the gradient of a weight whose update is done."""
    update = next(iter(module.graph.find_nodes(op="call_function", target=ops.update)))
    last = module.graph.find_nodes(op="call_function", target=ops.add_up)[-1]
    last.meta["gradient_of"] = update.meta["names"][0]


@pytest.mark.parametrize(
    ("mutate", "rule"),
    [
        (_read_twice, "which others read"),
        (_weight_added, "which no region call made"),
        (_in_forward, "does not belong to the backward part"),
        (_behind_the_update, "behind its update"),
    ],
)
def test_broken_programs_are_caught(mutate: Any, rule: str) -> None:
    pieces = Pieces((Chunk((Slice("weight_1", 0, 0, 3, 3),), 3, 24),))
    module = program([[0], [1]])
    RepeatCalls(3)(module)
    InsertUpdates(pieces)(module)
    policy = Policy(pieces=pieces, in_backward=True)
    verify_streams(module, policy)
    mutate(module)
    with pytest.raises(VerificationError, match=rule):
        verify_streams(module, policy)
