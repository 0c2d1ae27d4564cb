"""From a function with weights to the joint graph of it, and the comparison of its slices with autograd."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._pytree import tree_map

from chunkft_fx import passes
from chunkft_fx.graph.ops import narrow
from chunkft_fx.graph.region import DenseGradient, OutputDemand, RegionGraph, SliceDemand
from chunkft_fx.graph.rewrite import fake_value
from chunkft_fx.program.run_passes import over_region

# A cut of one weight, or what else may be demanded of its gradient.
Cut = tuple[int, int, int]
Asked = Cut | str | None
# A slice that a rule refuses: the cut dimension, the operator, its arguments, which of its results, and the reason.
Refusal = tuple[int, Any, tuple[Any, ...], int | None, str]


@dataclass(frozen=True)
class Joint:
    """A joint graph with values for its inputs; backward outputs are the gradients of the first primals."""

    region: RegionGraph
    function: Callable[..., Tensor]
    primals: tuple[Tensor, ...]
    num_weights: int
    tangent: Tensor

    def dense(self) -> tuple[Tensor, ...]:
        """The gradients of all weights, by autograd."""
        weights = [w.detach().clone().requires_grad_() for w in self.primals[: self.num_weights]]
        out = self.function(*weights, *self.primals[self.num_weights :])
        return torch.autograd.grad(out, weights, self.tangent)

    def run(self, region: RegionGraph, starts: Sequence[int] = ()) -> list[Any]:
        """The outputs of a rewritten copy of the graph, forward value first."""
        values = region.module(*self.primals, self.tangent, *(torch.tensor(s) for s in starts))
        return list(values)


def joint(
    function: Callable[..., Tensor],
    weights: Sequence[Tensor],
    inputs: Sequence[Tensor] = (),
    *,
    inductor: bool = False,
    dynamic: Mapping[int, Sequence[int]] | None = None,
) -> Joint:
    """Trace ``function(*weights, *inputs) -> Tensor`` and its backward into a region graph.

    ``inductor`` decomposes operators as Inductor expects; ``dynamic`` names dimensions of primals (by
    index) that become symbolic sizes.
    """
    primals = (*weights, *inputs)
    with torch.no_grad():
        tangent = torch.randn_like(function(*primals))

    grown = [w.detach().clone().requires_grad_() for w in weights]
    mode = FakeTensorMode(shape_env=ShapeEnv())
    axes = dynamic or {}
    fakes = [_fake(mode, value, axes.get(i, ())) for i, value in enumerate((*grown, *inputs))]
    table = dict(select_decomp_table()) if inductor else {}
    with mode:
        module = aot_export_joint_simple(
            # AOT does not export outputs that are views
            lambda *p: (function(*p).clone(),),
            tuple(fakes),
            trace_joint=True,
            decompositions=table,
        )
    assert isinstance(module, fx.GraphModule)
    return Joint(_region(module, len(primals), len(weights)), function, primals, len(weights), tangent)


def _fake(mode: FakeTensorMode, value: Tensor, dynamic: Sequence[int]) -> Tensor:
    sizes = [DimDynamic.DYNAMIC if d in dynamic else DimDynamic.STATIC for d in range(value.ndim)]
    return mode.from_tensor(value, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))


def _region(module: fx.GraphModule, num_primals: int, num_weights: int) -> RegionGraph:
    for i, node in enumerate(module.graph.find_nodes(op="placeholder")):
        node.meta["kind"] = "primal" if i < num_primals else "tangent"
        node.meta["partitioner_tag"] = "is_forward" if i < num_primals else "is_backward"
    for node in module.graph.nodes:
        is_backward = any(n.meta["partitioner_tag"] == "is_backward" for n in node.all_input_nodes)
        node.meta.setdefault("partitioner_tag", "is_backward" if is_backward else "is_forward")
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        module.graph.erase_node(node)  # only export records these
    output = module.graph.output_node()
    values = output.args[0]
    assert isinstance(values, (tuple, list))
    output.args = (tuple(values[: 1 + num_weights]),)
    module.graph.set_codegen(fx.graph.CodeGen())  # plain inputs and outputs, no pytrees
    return RegionGraph(fx.GraphModule(module, module.graph), 1)


def demands(asked: Sequence[Asked]) -> tuple[OutputDemand, ...]:
    """Demands of backward outputs, from cuts ``(dim, start, length)``, ``"whole"`` and None."""
    return tuple(SliceDemand(a[0], a[2]) if isinstance(a, tuple) else "whole" if a else None for a in asked)


def rewritten(case: Joint, *asked: Asked) -> RegionGraph:
    """A copy of the joint graph after the default pipeline, verified after every pass."""
    region = case.region.copy()
    over_region(region, passes.default_pipeline(demands(asked)))
    return region


def check(case: Joint, *asked: Asked, tolerance: float = 1e-9) -> RegionGraph:
    """Run the default pipeline and hold every demanded slice to autograd; returns the rewritten graph."""
    region = rewritten(case, *asked)
    starts = [a[1] for a in asked if isinstance(a, tuple)]
    found = case.run(region, starts)[1:]
    for gradient, value, request in zip(case.dense(), found, asked, strict=True):
        if request is None:
            assert value is None
            continue
        expected = gradient.narrow(*request) if isinstance(request, tuple) else gradient
        assert value.dtype == expected.dtype
        scale = float(gradient.abs().max()) if gradient.numel() else 0.0
        torch.testing.assert_close(value, expected, rtol=0, atol=tolerance * scale)
    return region


def refused(dim: int, target: Callable[..., Any], *args: Any, result: int | None = None) -> DenseGradient:
    """What is reported of a slice along ``dim`` of ``target(*args)``, or of one of its results, that cannot sink.

    Tensors among the arguments become inputs of a graph of this one operator, which the refusal must leave as it is.
    """
    graph, mode = fx.Graph(), FakeTensorMode()

    def placeholder(value: Any, kind: str = "tangent") -> Any:
        if not isinstance(value, Tensor):
            return value
        node = graph.placeholder(f"{kind}_{len(graph.nodes)}")
        node.meta.update(val=mode.from_tensor(value), kind=kind, partitioner_tag="is_backward")
        return node

    def call(function: Callable[..., Any], *arguments: Any) -> fx.Node:
        node = graph.call_function(function, arguments)
        node.meta.update(val=fake_value(node), partitioner_tag="is_backward")
        return node

    inputs = tree_map(placeholder, args)
    start = placeholder(torch.tensor(0), "start")
    value = call(target, *inputs)
    if result is not None:
        value = call(operator.getitem, value, result)
    part = call(narrow, value, dim, start, 1)
    part.meta.update(output=0, contracted=False)
    graph.output((part,))
    region = RegionGraph(fx.GraphModule(nn.Module(), graph), 0)
    before = str(graph)
    assert passes.SinkSlices()(region) == 0
    assert str(graph) == before
    (report,) = region.dense
    assert (report.op, report.output) == (str(target), 0)
    return report


def assert_sunk(region: RegionGraph, *numels: int) -> None:
    """No gradient is reported dense, and no operator that a tangent flows into makes a value of these sizes.

    Choose shapes so that no activation has as many elements as the weight.
    """
    assert region.dense == []
    dependent = set(region.placeholders("tangent"))
    for node in region.graph.nodes:
        if node.op == "call_function" and dependent.intersection(node.all_input_nodes):
            dependent.add(node)
            assert _numel(node) not in numels, f"{node.name} is as large as a weight"


def _numel(node: fx.Node) -> int:
    value = node.meta["val"]
    return value.numel() if isinstance(value, Tensor) else -1


def count(region: RegionGraph, target: Any) -> int:
    """How often an operator appears."""
    return len(region.graph.find_nodes(op="call_function", target=target))
