"""insert_updates: update each piece of the parameters, or keep its gradients, as soon as the backward lets that be.

Contract: every gradient of a parameter in ``pieces`` is taken by update nodes, and is no output of the program any
more. The update of a piece stands behind the last backward call that makes a gradient of one of its parameters or
reads one of them: its gradients are then complete, and no one can see a new weight beside an old activation. Where
gradients are only kept, for an update at the optimizer's step, weights stay, and the last gradient alone decides.
Pieces are taken one after another. The states of the first ``pieces.depth`` come in before the backward, those of each
later one when the states of the piece ``pieces.depth`` before it have begun to go out. A piece without a gradient is
left out.

All that comes to the device comes in turn (`copies.engines`), and states are wanted later than the weights and values
of the calls that follow. So of a region's pieces only as many as there are buffers are taken at once. The others, and
fetches for regions still to come, are spread over the micro-batches' calls of the next region, each behind a call: what
the call after it waits for is asked for before. Behind the last of these calls nothing is left to take: compute waits
there for all updates of the region before.

Terms: *piece* as in `plan.pieces`; a *contribution* is one region's gradient of a parameter, of which tied weights have
several. ``update`` (or ``keep``) takes all contributions to its slices, of the whole parameters; ``meta["names"]`` says
which parameter each belongs to, ``meta["group"]`` how many backward calls there are up to its gradients.

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
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
        groups = [sum(order[call] <= order[place] for call in calls) for place, _, _ in found]
        depth = self.pieces.depth
        takers, fetches = _slots(groups, depth)
        ends = _ends(calls, [place for place, _, _ in found], groups, order)
        nodes = sorted([(slot, at, False) for at, slot in enumerate(takers)] + [
            (slot, at - depth, True) for at, slot in enumerate(fetches)
        ])  # fmt: skip
        for slot, at, is_fetch in nodes:
            with module.graph.inserting_before(calls[0] if slot < 0 else ends[slot]):
                if is_fetch:
                    _marked(module.graph.call_function(ops.fetch_states, (found[at + depth][1],)))
                    continue
                _, i, names = found[at]
                taken = [(node, name) for name in names for node in contributions[name]]
                taker = _marked(module.graph.call_function(self.taker, ([node for node, _ in taken], i)))
                taker.meta["names"], taker.meta["group"] = tuple(name for _, name in taken), groups[at]
                _marked(module.graph.call_function(ops.write_states, (i,)))
        _keep_no_gradients(module.graph)
        return len(found)


def _slots(groups: Sequence[int], depth: int) -> tuple[list[int], list[int]]:
    """By piece, the call behind which it is taken, and that behind which its states are fetched; -1: before them all.

    ``groups`` has for each piece how many calls there are up to its gradients.
    """
    following = dict(pairwise(dict.fromkeys(groups)))
    takers: list[int] = []
    freed: list[int] = []  # by piece: the earliest call behind which its buffer may be filled again
    for group, share in groupby(groups):
        count = len(list(share))
        under_way = following.get(group, group) - group
        late = max(count - depth, 0) if under_way > 1 else 0
        takers += [group - 1] * (count - late) + [group + j * (under_way - 1) // late for j in range(late)]
        freed += [group - 1 if not under_way else group + j * under_way // count for j in range(count)]
    at_once = [-1] * min(depth, len(groups))
    later = zip(takers, freed, takers[depth:], strict=False)
    return takers, at_once + [min(max(out, free), taken) for out, free, taken in later]


def _ends(
    calls: Sequence[fx.Node], places: Sequence[fx.Node], groups: Sequence[int], order: Mapping[fx.Node, int]
) -> list[fx.Node]:
    """By call, the node before which pieces are taken: behind its items, and the gradients complete with it."""
    last = list(calls)
    for place, group in zip(places, groups, strict=True):
        last[group - 1] = max(last[group - 1], place, key=order.__getitem__)
    ends = []
    for node in last:
        after = node.next
        while after.target is operator.getitem:
            after = after.next
        ends.append(after)
    return ends


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
