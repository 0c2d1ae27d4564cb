"""insert_updates: update each piece of the parameters, or keep its gradients, as soon as the backward lets that be.

Contract: every gradient of a parameter in ``pieces`` is taken by update nodes, and is no output of the program any
more. The update of a piece stands behind the last backward call that makes a gradient of one of its parameters or
reads one of them: its gradients are then complete, and no one can see a new weight beside an old activation. Where
gradients are only kept, for an update at the optimizer's step, weights stay, and the last gradient alone decides.
Pieces are updated one after another; the states of the first ``pieces.depth`` come in from the beginning of the
backward, those of each later one when the states of the piece ``pieces.depth`` before it have begun to go out. A piece
without a gradient is left out.

Terms: *piece* as in `plan.pieces`; a *contribution* is one region's gradient of a parameter, of which tied weights have
several. ``update`` (or ``keep``) takes all contributions to its slices, of the whole parameters; ``meta["names"]`` says
which parameter each belongs to, ``meta["group"]`` behind how many backward calls it stands.

Before::

    layer_1: = self.layer_1_backward(saved, tangent);  gradient = layer_1[0]
    layer_0: = self.layer_0_backward(saved_1, layer_1[1])

After::

    chunkft_fx.fetch_states(1)
    layer_1: = self.layer_1_backward(saved, tangent);  gradient = layer_1[0]
    chunkft_fx.update([gradient], 1)
    chunkft_fx.write_states(1)
    layer_0: = self.layer_0_backward(saved_1, layer_1[1])
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch import fx

from chunkft_fx.graph import ops
from chunkft_fx.graph.ops import PARTS
from chunkft_fx.plan.pieces import Pieces


@dataclass(frozen=True)
class InsertUpdates:
    """Have nodes of this kind take the gradients of these pieces within the backward."""

    pieces: Pieces
    taker: Any = ops.update
    name: str = "insert_updates"

    def __call__(self, module: fx.GraphModule) -> int:
        """Rewrite a program in place; returns the number of pieces that have gradients."""
        calls = [n for n in module.graph.find_nodes(op="call_module") if _is_backward(module, n)]
        order = {node: i for i, node in enumerate(module.graph.nodes)}
        contributions = _contributions(module.graph)
        last: dict[str, fx.Node] = {name: nodes[-1] for name, nodes in contributions.items()}
        for call in calls if self.taker is ops.update else ():
            for name in {a.meta.get("parameter") for a in call.all_input_nodes} & last.keys():
                last[name] = max(last[name], call, key=order.__getitem__)
        found: list[tuple[fx.Node, int, list[str]]] = []
        for i, piece in enumerate(self.pieces):
            names = [s.name for s in piece.slices if s.name in contributions]
            if names:
                found.append((max((last[n] for n in names), key=order.__getitem__), i, names))
        found.sort(key=lambda entry: (order[entry[0]], -entry[1]))
        written: list[fx.Node] = []
        for place, i, names in found:
            taken = [(node, name) for name in names for node in contributions[name]]
            group = sum(order[call] <= order[place] for call in calls)
            written.append(self._insert(module.graph, place, i, taken, group))
        depth = self.pieces.depth
        for at, (_, i, _) in enumerate(found):
            before = calls[0] if at < depth else written[at - depth].next
            with module.graph.inserting_before(before):
                _marked(module.graph.call_function(ops.fetch_states, (i,)))
        _keep_no_gradients(module.graph)
        return len(found)

    def _insert(
        self, graph: fx.Graph, place: fx.Node, piece: int, taken: list[tuple[fx.Node, str]], group: int
    ) -> fx.Node:
        """Put a taker and its write-back behind a node, the items of its call, and what stands there already."""
        after = place
        while after.next.target is operator.getitem or after.next.target in ops.PIECE_NODES:
            after = after.next
        with graph.inserting_after(after):
            taker = _marked(graph.call_function(self.taker, ([node for node, _ in taken], piece)))
        taker.meta["names"], taker.meta["group"] = tuple(name for _, name in taken), group
        with graph.inserting_after(taker):
            return _marked(graph.call_function(ops.write_states, (piece,)))


def _contributions(graph: fx.Graph) -> dict[str, list[fx.Node]]:
    """The gradients of parameters that the program makes, by name, in the order in which they are made."""
    found: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        name = node.meta.get("gradient_of")
        if name is not None:
            found.setdefault(name, []).append(node)
    return found


def _marked(node: fx.Node) -> fx.Node:
    node.meta["part"] = PARTS[1]
    return node


def _keep_no_gradients(graph: fx.Graph) -> None:
    output = graph.output_node()
    results: Any = output.args[0]
    outputs, mutations, gradients = results
    output.args = ((outputs, mutations, tuple(g for g in gradients if g.meta.get("gradient_of") is None)),)


def _is_backward(module: fx.GraphModule, call: fx.Node) -> bool:
    return bool(module.get_submodule(str(call.target)).is_backward)
