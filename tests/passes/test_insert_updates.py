"""insert_updates: where updates and kept gradients stand in a program, and which broken programs are caught."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from torch import fx, nn

import chunkft_fx
from chunkft_fx.errors import VerificationError
from chunkft_fx.graph import ops
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.plan import pieces
from chunkft_fx.program.verify_streams import verify_streams
from tests.runtime.test_full_coverage import batch, twins
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
