"""Defines the joint graph of one region, which region passes read and rewrite, and what a pass is.

A region graph is an ``fx.GraphModule`` whose placeholders come in this order and kind
(``node.meta["kind"]``): ``"primal"`` (forward values and parameters), ``"tangent"`` (backward values
of later regions), ``"start"`` (``i64[]`` run-time slice starts, added by ``select_slices``). Its output
node holds one flat tuple: first ``num_forward_outputs`` forward values, then the backward values
(weight gradients and input gradients), each a node or ``None``. Every node but the output carries
``meta["val"]`` (a fake tensor or a symbolic number) and ``meta["partitioner_tag"]``
(``"is_forward"`` or ``"is_backward"``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import fx

from chunkft_fx.torch_internals import graph_module


@dataclass(frozen=True)
class DenseGradient:
    """A weight gradient that is computed whole although only a slice of it is demanded.

    ``output`` is the index among the backward outputs, ``op`` the operator that the slice could not move
    through, ``node`` the name of its node in the rewritten graph, ``module`` the path of the module it came
    from, ``nbytes`` the bytes of the dense value, ``reason`` why the operator's rule refused.
    """

    output: int
    op: str
    node: str
    module: str
    nbytes: int
    reason: str


@dataclass
class RegionGraph:
    """A joint graph in the form that this file describes, and the dense gradients that passes reported in it."""

    module: fx.GraphModule
    num_forward_outputs: int
    dense: list[DenseGradient] = field(default_factory=list)

    @property
    def graph(self) -> fx.Graph:
        """The graph of ``module``."""
        return self.module.graph

    @property
    def outputs(self) -> tuple[fx.Node | None, ...]:
        """The flat outputs, forward values first."""
        values = self.graph.output_node().args[0]
        assert isinstance(values, (tuple, list))
        return tuple(values)

    @property
    def backward_outputs(self) -> tuple[fx.Node | None, ...]:
        """The backward outputs: gradients of weights and inputs; None where nothing is demanded."""
        return self.outputs[self.num_forward_outputs :]

    def placeholders(self, kind: str) -> list[fx.Node]:
        """The placeholders of one kind (``"primal"``, ``"tangent"`` or ``"start"``), in order."""
        return [n for n in self.graph.find_nodes(op="placeholder") if n.meta["kind"] == kind]

    def set_outputs(self, values: tuple[fx.Node | None, ...]) -> None:
        """Replace the flat outputs; their number and order must stay."""
        assert len(values) == len(self.outputs)
        self.graph.output_node().args = (values,)

    def copy(self) -> RegionGraph:
        """An independent copy of the graph (metadata values are shared, they are never written)."""
        graph = fx.Graph()
        memo: dict[fx.Node, fx.Node] = {}
        output = graph.graph_copy(self.graph, memo)
        graph.output(output)
        for old, new in memo.items():
            new.meta = dict(old.meta)
        graph.output_node().meta = dict(self.graph.output_node().meta)
        return RegionGraph(graph_module(self.module, graph), self.num_forward_outputs, list(self.dense))


@dataclass(frozen=True)
class SliceDemand:
    """The demand for ``length`` indices of a backward output along ``dim``, from a run-time start."""

    dim: int
    length: int


# What is asked of one backward output: nothing, all of it, or a slice of it.
OutputDemand = SliceDemand | Literal["whole"] | None


class Pass(Protocol):
    """One rewrite of a region graph: a frozen dataclass whose call returns how many rewrites it made.

    ``numerics`` is ``"bitwise"`` when results stay equal to the bit and ``"reassociated"`` when sums
    may be taken in another order.
    """

    @property
    def name(self) -> str:
        """The name in logs, in ``chunkft inspect --pass`` and in errors of the verifier."""

    @property
    def numerics(self) -> Literal["bitwise", "reassociated"]:
        """What may happen to values: nothing (``bitwise``), or another order of sums (``reassociated``)."""

    def __call__(self, region: RegionGraph) -> int: ...


class ProgramPass(Protocol):
    """One rewrite of a program, the outer graph of a step: its call returns how many rewrites it made.

    It adds, moves or removes nodes around region calls; values stay equal to the bit.
    """

    @property
    def name(self) -> str:
        """The name in logs and in what is counted of each pass."""

    def __call__(self, module: fx.GraphModule) -> int: ...
