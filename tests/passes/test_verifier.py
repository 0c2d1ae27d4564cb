"""The verifier objects to graphs that a pass has broken, and names the pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from torch import fx
from torch.nn import functional

from chunkft_fx.errors import VerificationError
from chunkft_fx.graph.region import OutputDemand, RegionGraph
from chunkft_fx.graph.rewrite import fake_value
from chunkft_fx.passes import SelectSlices
from chunkft_fx.program import verify_region
from chunkft_fx.program.run_passes import over_region
from tests.passes.joint import demands, joint

aten = torch.ops.aten


@dataclass(frozen=True)
class Break:
    """A pass with a defect."""

    mutation: Callable[[RegionGraph], None]
    name: str = "break"
    numerics: Literal["bitwise", "reassociated"] = "bitwise"

    def __call__(self, region: RegionGraph) -> int:
        self.mutation(region)
        return 1


def _region() -> RegionGraph:
    """Forward ``f32[4, 3]``; gradients ``f32[7, 5]`` and ``f32[3, 7]``, sliced to ``f32[2, 5]`` and ``f32[3, 1]``."""
    weights = [torch.randn(7, 5), torch.randn(3, 7)]
    case = joint(lambda a, b, x: functional.linear(functional.linear(x, a).tanh(), b), weights, [torch.randn(4, 5)])
    region = case.region.copy()
    over_region(region, [SelectSlices(demands([(0, 1, 2), (1, 0, 1)]))])
    return region


def _node(region: RegionGraph, target: Any, index: int = 0) -> fx.Node:
    return list(region.graph.find_nodes(op="call_function", target=target))[index]


def _set_value(region: RegionGraph, value: torch.Tensor) -> None:
    node = _node(region, aten.mm.default)
    with node.meta["val"].fake_mode as mode:
        node.meta["val"] = mode.from_tensor(value)


def _wrong_shape(region: RegionGraph) -> None:
    _set_value(region, torch.empty(4, 8))


def _wrong_dtype(region: RegionGraph) -> None:
    _set_value(region, torch.empty(4, 7, dtype=torch.float64))


def _missing_value(region: RegionGraph) -> None:
    del _node(region, aten.tanh.default).meta["val"]


def _missing_tag(region: RegionGraph) -> None:
    del _node(region, aten.tanh.default).meta["partitioner_tag"]


def _wrong_tag(region: RegionGraph) -> None:
    _node(region, aten.tanh_backward.default).meta["partitioner_tag"] = "is_forward"


def _use_before_definition(region: RegionGraph) -> None:
    node = _node(region, aten.tanh.default)
    node.all_input_nodes[0].prepend(node)


def _foreign_operand(region: RegionGraph) -> None:
    _node(region, aten.tanh.default).update_arg(0, _node(_region(), aten.mm.default))


def _operand_of_another_shape(region: RegionGraph) -> None:
    _node(region, aten.mm.default).update_arg(1, region.placeholders("primal")[1])


def _tangent_before_primals(region: RegionGraph) -> None:
    region.placeholders("primal")[0].prepend(region.placeholders("tangent")[0])


def _placeholder_behind_operators(region: RegionGraph) -> None:
    start = region.placeholders("start")[1]
    next(iter(start.users)).prepend(start)


def _unknown_kind(region: RegionGraph) -> None:
    region.placeholders("start")[0].meta["kind"] = "offset"


def _missing_kind(region: RegionGraph) -> None:
    del region.placeholders("primal")[0].meta["kind"]


def _start_of_wrong_dtype(region: RegionGraph) -> None:
    start = region.placeholders("start")[0]
    start.meta["val"] = start.meta["val"].to(torch.int32)


def _start_with_dimensions(region: RegionGraph) -> None:
    start = region.placeholders("start")[0]
    start.meta["val"] = start.meta["val"].unsqueeze(0)


def _removed_start(region: RegionGraph) -> None:
    start = region.placeholders("start")[1]
    start.replace_all_uses_with(region.placeholders("start")[0])
    _node(region, torch.ops.chunkft_fx.narrow.default).args = (_node(region, aten.tanh.default), 0, 1, 2)
    region.graph.erase_node(start)


def _swapped_outputs(region: RegionGraph) -> None:
    out, first, second = region.outputs
    region.set_outputs((out, second, first))


def _dropped_output(region: RegionGraph) -> None:
    region.set_outputs((*region.outputs[:-1], None))


def _fewer_outputs(region: RegionGraph) -> None:
    region.graph.output_node().args = (region.outputs[:-1],)


def _missing_forward_output(region: RegionGraph) -> None:
    region.set_outputs((None, *region.outputs[1:]))


def _whole_output(region: RegionGraph) -> None:
    value = region.backward_outputs[0]
    assert value is not None
    region.set_outputs((region.outputs[0], value.args[0], region.outputs[2]))  # type: ignore[arg-type]


def _forward_output_from_tangent(region: RegionGraph) -> None:
    region.set_outputs((region.placeholders("tangent")[0], *region.outputs[1:]))


def _forward_from_start(region: RegionGraph) -> None:
    node = _node(region, aten.tanh.default)
    with region.graph.inserting_before(node):
        added = region.graph.call_function(aten.add.Tensor, (node.args[0], region.placeholders("start")[0]))
    added.meta = {"val": fake_value(added), "partitioner_tag": "is_forward"}
    node.update_arg(0, added)


def _writes_memory(region: RegionGraph) -> None:
    _node(region, aten.tanh.default).target = aten.tanh_.default


def _not_an_operator(region: RegionGraph) -> None:
    node = _node(region, aten.tanh.default)
    node.op, node.target = "call_method", "tanh"


def _strides_under_a_view(region: RegionGraph) -> None:
    node = _node(region, aten.mm.default)
    with region.graph.inserting_after(node):
        view = region.graph.call_function(aten.view.default, (node, [28]))
    view.meta = {"val": fake_value(view), "partitioner_tag": "is_forward"}
    _set_value(region, torch.empty(7, 4).t())


BROKEN = {
    _wrong_shape: "recorded as",
    _wrong_dtype: "recorded as",
    _missing_value: "lacks a value",
    _missing_tag: "lacks a value or a tag",
    _wrong_tag: "needs backward values but is tagged is_forward",
    _use_before_definition: "not in order",
    _foreign_operand: "not in order",
    _operand_of_another_shape: "does not accept its operands",
    _tangent_before_primals: "primals, tangents, starts",
    _placeholder_behind_operators: "behind an operator",
    _unknown_kind: "offset",
    _missing_kind: "None",
    _start_of_wrong_dtype: "must be an i64",
    _start_with_dimensions: "must be an i64",
    _removed_start: "does not accept its operands",
    _swapped_outputs: "output 1 was",
    _dropped_output: "output 2 was dropped",
    _fewer_outputs: "3 outputs became 2",
    _missing_forward_output: "forward output 0",
    _whole_output: "output 1 was",
    _forward_output_from_tangent: "forward output 0",
    _forward_from_start: "needs backward values",
    _writes_memory: "writes memory",
    _not_an_operator: "only operators",
    _strides_under_a_view: "feeds a view",
}


@pytest.mark.parametrize(("mutation", "message"), BROKEN.items(), ids=lambda m: getattr(m, "__name__", None))
def test_objects_to(mutation: Callable[[RegionGraph], None], message: str) -> None:
    with pytest.raises(VerificationError, match=message) as caught:
        over_region(_region(), [Break(mutation)])
    assert str(caught.value).startswith("after break: ")


def test_accepts_a_sound_graph() -> None:
    assert over_region(_region(), [Break(lambda region: None)]) == {"break": 1}


def test_objects_to_an_output_that_appears() -> None:
    region = _region()
    first = region.backward_outputs[0]
    region.set_outputs((region.outputs[0], None, region.outputs[2]))

    def appear(region: RegionGraph) -> None:
        region.set_outputs((region.outputs[0], first, region.outputs[2]))

    with pytest.raises(VerificationError, match="output 1 appeared"):
        over_region(region, [Break(appear)])


@dataclass(frozen=True)
class WrongSlices:
    """Says it does what ``demand`` asks for, and does something else."""

    demand: tuple[OutputDemand, ...]
    actual: tuple[OutputDemand, ...]
    name: str = "wrong_slices"
    numerics: Literal["bitwise", "reassociated"] = "bitwise"

    def __call__(self, region: RegionGraph) -> int:
        return SelectSlices(self.actual)(region)


@pytest.mark.parametrize("actual", [(0, 1, 3), (1, 0, 2), "whole"], ids=str)
def test_objects_to_another_slice_than_demanded(actual: Any) -> None:
    case = joint(lambda w, x: functional.linear(x, w), [torch.randn(7, 5)], [torch.randn(4, 5)])
    with pytest.raises(VerificationError, match="output 1 was"):
        over_region(case.region.copy(), [WrongSlices(demands([(0, 0, 2)]), demands([actual]))])


def test_only_what_changed_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    region, computed = _region(), []

    def counted(node: fx.Node) -> Any:
        computed.append(node.target)
        return fake_value(node)

    def other_operator(region: RegionGraph) -> None:
        _node(region, aten.tanh.default).target = aten.sin.default

    monkeypatch.setattr(verify_region, "fake_value", counted)
    over_region(region, [Break(lambda _: None)])
    assert computed == []
    over_region(region.copy(), [Break(other_operator)])
    assert computed == [aten.sin.default]
