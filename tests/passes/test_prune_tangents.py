"""prune_tangents: gradients that the caller will not provide count as zero, and feed nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from chunkft_fx.graph.region import RegionGraph
from chunkft_fx.passes import Eliminate, PruneTangents
from chunkft_fx.program.run_passes import over_region

aten = torch.ops.aten


def _graph(build: Any, tangents: int) -> RegionGraph:
    """A region ``f32[3, 4]`` throughout: ``build(emit, x, *tangents)`` gives the backward outputs."""
    mode = torch._subclasses.fake_tensor.FakeTensorMode()
    graph = fx.Graph()

    def inputs(kind: str, count: int) -> list[fx.Node]:
        nodes = [graph.placeholder(f"{kind}s_{i}") for i in range(count)]
        for node in nodes:
            tag = "is_forward" if kind == "primal" else "is_backward"
            node.meta = {"val": mode.from_tensor(torch.empty(3, 4)), "kind": kind, "partitioner_tag": tag}
        return nodes

    def emit(target: Any, *args: Any, tag: str = "is_backward") -> fx.Node:
        node = graph.call_function(target, args)
        with mode:
            node.meta = {"val": target(*fx.map_arg(args, lambda n: n.meta["val"])), "partitioner_tag": tag}
        return node

    (x,) = inputs("primal", 1)
    given = inputs("tangent", tangents)
    forward = emit(aten.tanh.default, x, tag="is_forward")
    graph.output((forward, *build(emit, x, *given)))
    return RegionGraph(fx.GraphModule({}, graph), 1)


def _prune(region: RegionGraph, *absent: bool) -> RegionGraph:
    over_region(region, [PruneTangents(absent), Eliminate()])
    return region


def _values(region: RegionGraph, *tangents: Tensor) -> list[Any]:
    torch.manual_seed(0)
    return list(region.module(torch.randn(3, 4), *tangents))


def test_sum_loses_its_zero_operand() -> None:
    region = _graph(lambda emit, x, a, b: [emit(aten.add.Tensor, emit(aten.mul.Tensor, a, x), b)], 2)
    _prune(region, False, True)
    assert region.graph.find_nodes(op="call_function", target=aten.add.Tensor) == []


@pytest.mark.parametrize("absent", [(True, False), (False, True), (False, False)])
def test_result_equals_that_of_zero_tangents(absent: tuple[bool, bool]) -> None:
    def build(emit: Any, x: fx.Node, a: fx.Node, b: fx.Node) -> list[fx.Node]:
        scaled = emit(aten.mul.Tensor, a, x)
        total = emit(aten.add.Tensor, scaled, b)
        return [emit(aten.sub.Tensor, total, scaled), emit(aten.cat.default, [a, b], 0), scaled]

    tangents = [torch.zeros(3, 4) if gone else torch.randn(3, 4) for gone in absent]
    expected = _values(_graph(build, 2), *tangents)
    found = _values(_prune(_graph(build, 2), *absent), *tangents)
    for value, reference in zip(found, expected, strict=True):
        assert torch.equal(reference, torch.zeros_like(reference)) if value is None else torch.equal(value, reference)


def test_gradients_of_absent_tangents_alone_vanish() -> None:
    region = _graph(lambda emit, x, a, b: [emit(aten.mul.Tensor, a, x), emit(aten.mul.Tensor, b, x)], 2)
    _prune(region, True, False)
    assert [n is None for n in region.backward_outputs] == [True, False]
    assert [bool(n.users) for n in region.placeholders("tangent")] == [False, True]


def test_nothing_absent_changes_nothing() -> None:
    region = _graph(lambda emit, x, a: [emit(aten.mul.Tensor, a, x)], 1)
    assert PruneTangents((False,))(region) == 0


def test_refuses_to_drop_an_operand_that_widens_the_sum() -> None:
    """A sum that broadcasts its other operand keeps a real zero of the right shape."""

    def build(emit: Any, x: fx.Node, a: fx.Node, b: fx.Node) -> list[fx.Node]:
        row = emit(aten.sum.dim_IntList, a, [0], True)
        return [emit(aten.add.Tensor, row, b)]

    region = _prune(_graph(build, 2), False, True)
    (output,) = region.backward_outputs
    assert output is not None
    assert tuple(output.meta["val"].shape) == (3, 4)
    tangent = torch.randn(3, 4)
    assert torch.equal(_values(region, tangent, torch.zeros(3, 4))[1], tangent.sum(0, True).expand(3, 4))


def test_refuses_a_number_of_marks_other_than_that_of_tangents() -> None:
    with pytest.raises(ValueError, match="zip"):
        PruneTangents((True, False))(_graph(lambda emit, x, a: [a], 1))
