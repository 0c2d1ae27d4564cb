"""eliminate: nothing is computed that nobody asks for, and what stays is unchanged to the bit."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from chunkft_fx.passes import Eliminate, SelectSlices
from chunkft_fx.program.run_passes import over_region
from tests.passes.joint import Joint, count, demands, joint

aten = torch.ops.aten


def _case() -> Joint:
    weights = [torch.randn(6, 3, 3, 3), torch.randn(6), torch.randn(6), torch.randn(5, 6)]

    def function(a: Tensor, g: Tensor, b: Tensor, d: Tensor, x: Tensor) -> Tensor:
        y = functional.group_norm(functional.conv2d(x, a), 2, g, b)
        return functional.linear(functional.layer_norm(y.mean((2, 3)), (6,)), d).tanh()

    return joint(function, weights, [torch.randn(2, 3, 7, 7)])


@settings(max_examples=16)
@given(st.lists(st.sampled_from([None, "whole"]), min_size=4, max_size=4))
def test_what_is_asked_stays_to_the_bit(asked: list[str | None]) -> None:
    case = _case()
    dense = case.run(case.region.copy())
    region = case.region.copy()
    over_region(region, [SelectSlices(demands(asked)), Eliminate()])
    for value, expected, request in zip(case.run(region)[1:], dense[1:], asked, strict=True):
        assert value is None if request is None else torch.equal(value, expected)
    used = {n for node in region.graph.nodes for n in node.all_input_nodes}
    assert all(n in used for n in region.graph.nodes if n.op == "call_function")


def test_backward_stops_at_the_lowest_demand() -> None:
    region = _case().region.copy()
    over_region(region, [SelectSlices(demands([None, None, None, "whole"])), Eliminate()])
    assert count(region, aten.native_layer_norm_backward.default) == 0
    assert count(region, aten.native_group_norm_backward.default) == 0
    assert count(region, aten.convolution_backward.default) == 0
    assert count(region, aten.mm.default) == 2


def test_results_nobody_reads_are_masked_out() -> None:
    region = _case().region.copy()
    over_region(region, [SelectSlices(demands(["whole", None, "whole", None])), Eliminate()])
    (group,) = region.graph.find_nodes(op="call_function", target=aten.native_group_norm_backward.default)
    (convolution,) = region.graph.find_nodes(op="call_function", target=aten.convolution_backward.default)
    assert group.args[9] == [True, False, True]
    assert convolution.args[10] == [False, True, False]


def test_inputs_stay_although_unused() -> None:
    region = _case().region.copy()
    before = [n.name for n in region.graph.find_nodes(op="placeholder")]
    over_region(region, [SelectSlices(demands([None] * 4)), Eliminate()])
    assert [n.name for n in region.graph.find_nodes(op="placeholder")] == before


def test_operators_that_write_memory_stay() -> None:
    region = _case().region.copy()
    first = region.placeholders("primal")[0]
    with region.graph.inserting_before(region.graph.output_node()):
        write = region.graph.call_function(aten.add_.Scalar, (first, 1))
    Eliminate()(region)
    assert write in region.graph.nodes


def test_unread_random_operators_go() -> None:
    region = _case().region.copy()
    first = region.placeholders("primal")[0]
    with region.graph.inserting_before(region.graph.output_node()):
        region.graph.call_function(aten.rand_like.default, (first,))
    Eliminate()(region)
    assert count(region, aten.rand_like.default) == 0


def test_second_run_finds_nothing() -> None:
    region = _case().region.copy()
    SelectSlices(demands([None, "whole", None, None]))(region)
    assert Eliminate()(region) > 0
    assert Eliminate()(region) == 0
