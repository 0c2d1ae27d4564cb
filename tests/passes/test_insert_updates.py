"""insert_updates: where updates and kept gradients stand in a program, and which broken programs are caught."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate, groupby
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn

import chunkft_fx
from chunkft_fx.errors import VerificationError
from chunkft_fx.graph import ops
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.passes.program import insert_updates
from chunkft_fx.plan import pieces
from chunkft_fx.program.verify_streams import verify_streams
from tests.runtime.test_full_coverage import assert_equal, batch, twins
from tests.support.waiting import waiting_in_host

Mutation = Callable[[fx.Graph], object]


@pytest.fixture(params=["keep", "update"])
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> CompiledModule:
    monkeypatch.setattr(pieces, "LARGEST_NBYTES", 1000)
    with waiting_in_host():
        compiled = chunkft_fx.compile(twins()[1], "1GB", coverage="all", backend="eager")
        assert isinstance(compiled, CompiledModule)
        optimizer = chunkft_fx.AdamW(compiled, update="step" if request.param == "keep" else "backward")
        compiled(batch(0)).backward()
        optimizer.step()
    return compiled


def takers(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.target in ops.TAKERS]


def test_takers_stand_behind_the_last_gradient_and_an_update_behind_the_last_reader_too(model: CompiledModule) -> None:
    graph = model.program.graph
    order = {n: i for i, n in enumerate(graph.nodes)}
    verify_streams(model.program.module, model.plan.policy)
    assert len(takers(graph)) == len(model.plan.policy.pieces)
    for taker in takers(graph):
        given: Any = taker.args[0]
        assert {g.meta["gradient_of"] for g in given} == set(taker.meta["names"])
        made = [n for n in graph.nodes if n.meta.get("gradient_of") in taker.meta["names"]]
        assert set(made) == set(given)
        assert max(order[n] for n in made) < order[taker]
        if taker.target is ops.update:
            read = [n for p in graph.nodes if p.meta.get("parameter") in taker.meta["names"] for n in p.users]
            assert all(order[n] < order[taker] for n in read if n.op == "call_module")


def _twice(graph: fx.Graph) -> None:
    node = takers(graph)[0]
    with graph.inserting_after(node):
        graph.node_copy(node)


def _unfetched(graph: fx.Graph) -> None:
    graph.erase_node(graph.find_nodes(op="call_function", target=ops.fetch_states)[0])


def _unwritten(graph: fx.Graph) -> None:
    graph.erase_node(graph.find_nodes(op="call_function", target=ops.write_states)[-1])


def _written_early(graph: fx.Graph) -> None:
    write = graph.find_nodes(op="call_function", target=ops.write_states)[0]
    takers(graph)[0].prepend(write)


def _fetched_twice(graph: fx.Graph) -> None:
    node = graph.find_nodes(op="call_function", target=ops.fetch_states)[0]
    with graph.inserting_after(node):
        graph.node_copy(node)


def _too_many(graph: fx.Graph) -> None:
    fetches = graph.find_nodes(op="call_function", target=ops.fetch_states)
    fetches[0].append(fetches[-1])


def _in_forward(graph: fx.Graph) -> None:
    takers(graph)[0].meta["part"] = "forward"


def _before_a_gradient(graph: fx.Graph) -> None:
    """The update of a tied weight behind its first contribution."""
    tied = next(n for n in takers(graph) if "embed.weight" in n.meta["names"])
    given: Any = tied.args[0]
    first = next(g for g in given if g.meta["gradient_of"] == "embed.weight")
    tied.args = ([first], tied.args[1])
    tied.meta["names"] = ("embed.weight",)
    fetch = next(n for n in graph.find_nodes(op="call_function", target=ops.fetch_states) if n.args[0] == tied.args[1])
    first.append(tied)
    first.append(fetch)


MUTATIONS: list[tuple[Mutation, str]] = [
    (_twice, "a second time"),
    (_unfetched, "which are not there"),
    (_unwritten, "never written back"),
    (_written_early, "before its update"),
    (_fetched_twice, "a second time"),
    (_too_many, "needs a buffer"),
    (_in_forward, "does not belong to the backward part"),
    (_before_a_gradient, "is a gradient of embed.weight behind its update"),
]


@pytest.mark.parametrize(("mutate", "rule"), MUTATIONS)
def test_broken_programs_are_caught(model: CompiledModule, mutate: Mutation, rule: str) -> None:
    module = model.program.module
    mutate(module.graph)
    policy = model.plan.policy
    if mutate is not _too_many:  # with room for any number
        policy = replace(policy, pieces=replace(policy.pieces, depth=99))
    with pytest.raises(VerificationError, match=rule):
        verify_streams(module, policy)


def _reading(graph: fx.Graph, root: nn.Module) -> None:
    """A call behind all takers reads a weight once more."""
    weight = next(n for n in graph.nodes if n.meta.get("parameter") == "layers.1.weight")
    call = next(n for n in graph.find_nodes(op="call_module") if root.get_submodule(str(n.target)).is_backward)
    with graph.inserting_before(graph.output_node()):
        copied = graph.node_copy(call, lambda n: n)
        copied.args = (weight,)


def test_only_an_update_forbids_to_read_a_weight_behind_it(model: CompiledModule) -> None:
    module = model.program.module
    _reading(module.graph, module)
    if takers(module.graph)[0].target is ops.keep:
        verify_streams(module, model.plan.policy)
        return
    with pytest.raises(VerificationError, match=r"reads layers\.1\.weight behind its update"):
        verify_streams(module, model.plan.policy)


def test_pieces_are_taken_between_the_micro_batches_of_the_next_region(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that none of their calls waits for the states of a whole region."""
    monkeypatch.setattr(pieces, "LARGEST_NBYTES", 300)
    monkeypatch.setattr(pieces, "MOST_BUFFERS", 3)
    plain, model = twins()
    compiled = chunkft_fx.compile(model, "1GB", coverage="all", backend="eager")
    assert isinstance(compiled, CompiledModule)
    optimizers = [
        chunkft_fx.AdamW(compiled, lr=1e-2, update="backward"),
        torch.optim.AdamW(plain.parameters(), lr=1e-2),
    ]
    for step in range(3):
        batches = [batch(4 * step + i) for i in range(4)]
        torch.stack(compiled.accumulate([(b,) for b in batches])).sum().backward()
        torch.stack([plain(b) for b in batches]).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert_equal(compiled, plain, 1e-9)
    module, depth = compiled.program.module, compiled.plan.policy.pieces.depth
    assert depth == 3
    verify_streams(module, compiled.plan.policy)
    nodes = [n for n in module.graph.nodes if n.target in (*ops.TAKERS, ops.fetch_states) or _is_backward(module, n)]
    assert [n.target for n in nodes[:depth]] == [ops.fetch_states] * depth
    runs = ["".join(kinds) for is_call, kinds in groupby(map(_kind, nodes), key="c".__eq__) if not is_call]
    assert any(run.count("t") > depth for run in runs[-1:])  # behind the last call of all
    assert all(run.count("t") <= depth for run in runs[:-1])
    assert sum("t" in run for run in runs) > len(compiled.plan.policy.pieces) // 10


def _is_backward(module: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and bool(module.get_submodule(str(node.target)).is_backward)


def _kind(node: fx.Node) -> str:
    return "c" if node.op == "call_module" else "t" if node.target in ops.TAKERS else "f"


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 12)), min_size=1, max_size=5), st.integers(1, 20))
def test_pieces_are_spread_in_turn(regions: list[tuple[int, int]], depth: int) -> None:
    """Each region has some calls, and some pieces that are complete behind the last of them."""
    ends = list(accumulate(calls for calls, _ in regions))
    groups = [end for end, (_, count) in zip(ends, regions, strict=True) for _ in range(count)]
    takers, fetches = insert_updates._slots(groups, depth)
    assert takers == sorted(takers)
    assert fetches == sorted(fetches)
    assert fetches[:depth] == [-1] * min(depth, len(groups))
    for at, (taker, fetch) in enumerate(zip(takers, fetches, strict=True)):
        assert fetch <= taker
        assert at < depth or fetch >= takers[at - depth]
    for i, (end, (_, count)) in enumerate(zip(ends, regions, strict=True)):
        own = [taker for taker, group in zip(takers, groups, strict=True) if group == end]
        assert own.count(end - 1) >= min(count, depth)
        beside = range(end, ends[i + 1] - 1) if i + 1 < len(ends) else range(0)
        shares = [own.count(call) for call in beside]
        assert own.count(end - 1) + sum(shares) == count
        if shares:
            assert own.count(end - 1) == min(count, depth)
            assert max(shares) - min(shares) <= 1
