"""repeat_calls: run several micro-batches in one program, each region over all of them before the next region.

Contract: what a program does for one micro-batch it does for each of ``count``, as if one had run after the other.
Placeholders with ``meta["is_own"]`` (inputs that are neither weights nor buffers, and tangents) are there once for each
micro-batch, side by side, and so is every output. Weights are read by all. The gradients of a parameter that the
micro-batches give are added up, in their order, as they are made: the program's gradients are as many as before.
A buffer that the forward writes has the value of the micro-batch before it, and in the end that of the last; a program
in which a region reads a buffer that a later region writes cannot run in this order, and is refused with
`UnsupportedGraph`.

Terms: the *group* of a region call are its copies, one for each micro-batch, which stand behind one another. Which
value of the program a written buffer gets is in its placeholder's ``meta["mutation"]``, by position.

Before::

    layer_0: = self.layer_0_forward(weight, x)
    ...
    layer_0_backward: = self.layer_0_backward(weight, x, tangent);  gradient = layer_0_backward[0]

After::

    layer_0: = self.layer_0_forward(weight, x)
    layer_0_m1: = self.layer_0_forward(weight, x_1)
    ...
    layer_0_backward: = self.layer_0_backward(weight, x, tangent);  gradient = layer_0_backward[0]
    layer_0_backward_m1: = self.layer_0_backward(weight, x_1, tangent_1);  gradient_m1 = layer_0_backward_m1[0]
    total: = chunkft_fx.add_up([gradient, gradient_m1])
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from chunkft_fx.errors import UnsupportedGraph
from chunkft_fx.graph import ops
from chunkft_fx.graph.ops import PARTS


@dataclass(frozen=True)
class RepeatCalls:
    """Run ``count`` micro-batches."""

    count: int
    name: str = "repeat_calls"

    def __call__(self, module: fx.GraphModule) -> int:
        """Rewrite a program in place; returns the number of region calls added."""
        written = _Written(module.graph, self.count)
        for group in _groups(module.graph):
            written.copy(group)
        written.finish()
        module.graph = written.graph
        return (self.count - 1) * len(module.graph.find_nodes(op="call_module")) // self.count


class _Written:
    """The new program: for each micro-batch what stands for a node of the old one, and sums of gradients."""

    def __init__(self, old: fx.Graph, count: int) -> None:
        self.graph = fx.Graph()
        results: Any = old.output_node().args[0]
        self.outputs, self.mutations, self.gradients = results
        self._copies: list[dict[fx.Node, fx.Node]] = [{} for _ in range(count)]
        self._summed = set(self.gradients)
        self._sums: dict[fx.Node, fx.Node] = {}
        for node in old.find_nodes(op="placeholder"):
            for copies in self._copies:
                is_new = node.meta.get("is_own") or copies is self._copies[0]
                copies[node] = self._placeholder(node) if is_new else self._copies[0][node]

    def copy(self, group: list[fx.Node]) -> None:
        """Copy a region call and what is taken from calls behind it, once for each micro-batch."""
        for micro_batch, copies in enumerate(self._copies):
            for node in group:
                copies[node] = self._copy(node, micro_batch)
            for node in group:
                if node in self._summed:
                    self._add(node, copies[node])

    def finish(self) -> None:
        """Write the output node."""
        last = len(self._copies) - 1
        outputs = tuple(
            self._value(o, m) if isinstance(o, fx.Node) else o for m in range(last + 1) for o in self.outputs
        )
        mutations = tuple(self._copies[last][m] for m in self.mutations)
        self.graph.output((outputs, mutations, tuple(self._sums.get(g, g) for g in self.gradients)))

    def _placeholder(self, node: fx.Node) -> fx.Node:
        made = self.graph.node_copy(node)
        made.target = made.name  # the name of an argument, which there is once
        return made

    def _copy(self, node: fx.Node, micro_batch: int) -> fx.Node:
        """A node for a micro-batch, by a name that no other has: torch 2.11 searches long for those that do."""
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self._value(n, micro_batch))
        name = f"{node.name}_m{micro_batch}" if micro_batch else node.name
        made = self.graph.create_node(node.op, node.target, args, kwargs, name, node.type)
        made.meta = dict(node.meta)
        return made

    def _value(self, node: fx.Node, micro_batch: int) -> fx.Node:
        """What a micro-batch reads for a node of the old program: of a written buffer, what the one before it left."""
        mutation = node.meta.get("mutation")
        if mutation is None or micro_batch == 0:
            return self._copies[micro_batch][node]
        left = self._copies[micro_batch - 1].get(self.mutations[mutation])
        if left is None:
            raise UnsupportedGraph(
                f"micro-batches cannot run region by region: the model writes {node.name!r} in a later region than one "
                "that reads it, so that a micro-batch would read what the one before it has not written yet; run them "
                "one after the other, inside no_sync() up to the last"
            )
        return left

    def _add(self, node: fx.Node, gradient: fx.Node) -> None:
        """Add what a micro-batch gives to a gradient to what those before it gave."""
        before = self._sums.get(node)
        if before is None:
            self._sums[node] = gradient
            return
        total = self.graph.call_function(ops.add_up, ([before, gradient],))
        total.meta["part"] = PARTS[1]
        # only the sum of all is the gradient
        total.meta["gradient_of"] = before.meta.pop("gradient_of")
        gradient.meta.pop("gradient_of")
        self._sums[node] = total


def _groups(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """The nodes from each region call up to the next."""
    group: list[fx.Node] = []
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if node.op == "call_module" and group:
            yield group
            group = []
        group.append(node)
    if group:
        yield group
