"""Copies the joint graph of one block for the blocks that were left out of a trace.

The blocks left out ran between two that were traced, and equal both. So they are copies of the traced one before them
(``middle``), where each reads of its neighbours what that reads of its own:

    before: (add_5, ...) = first;  (add_9, ...) = middle(add_5, w_2);  (add_13, ...) = last(add_9, w_31)
    after:  ... (add_9, ...) = middle(add_5, w_2);  (add_9_1, ...) = middle(add_9, w_3);  ... last(add_9_28, w_31)

That holds if the joint graphs of the three differ in nothing but their neighbours, which is looked at node by node.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, fx

from chunkft_fx.capture.capture import Capture, OutputName
from chunkft_fx.capture.outline import backward_regions, bounds, forward_regions, is_call_of_forward, value_text
from chunkft_fx.capture.repeats.find import Repeats, Unit
from chunkft_fx.torch_sizes import symbols

# A node that another reads: whose it is, and which of them.
Reference = tuple[str, Any]


@dataclass(frozen=True)
class _Part:
    """The joint graph of a unit: its nodes in order, and the inputs that it alone reads, both with their numbers.

    The inputs are primals, then tangents of the outputs that it makes; ``outputs`` are positions in a capture.
    ``constants`` are those of the trace that it reads.
    """

    unit: Unit
    nodes: dict[fx.Node, int]
    own: dict[fx.Node, int]
    outputs: tuple[int, ...]
    constants: dict[fx.Node, int]

    def reference(self, node: fx.Node, before: _Part | None, after: _Part | None) -> Reference:
        places = [("%", self.nodes), ("#", self.own), ("$", self.constants)]
        places += [("<", before.nodes)] if before else []
        places += [(">", after.nodes)] if after else []
        return next(((kind, known[node]) for kind, known in places if node in known), ("@", node.name))


def fill(capture: Capture, repeats: Repeats, blocks: Sequence[str]) -> bool:
    """Put copies of the middle unit into a capture for those that were left out.

    Returns False, and changes nothing, where the three units are not equal in the joint graph.
    """
    parts = _parts(capture, repeats, blocks)
    if parts is None or not _are_constants_alike(capture, *parts) or not _is_alike(*parts):
        return False
    if not _is_apart(capture, parts) or not _is_in_order(capture, parts):
        return False
    _put(capture, repeats, parts)
    return True


def _parts(capture: Capture, repeats: Repeats, blocks: Sequence[str]) -> tuple[_Part, _Part, _Part] | None:
    forward, labels = forward_regions(capture, blocks)
    regions = backward_regions(capture, forward)
    by_name = {n.name: n for n in capture.graph.find_nodes(op="placeholder")}
    tangents = {i: name for name, i in capture.tangents.items()}
    absent = sorted(i for unit in repeats.left_out for i in unit.outputs)
    found = []
    for unit in (repeats.first, repeats.middle, repeats.last):
        if any(labels.count(label) != 1 for label in unit.blocks):
            return None
        indices = {labels.index(label) for label in unit.blocks}
        nodes = [n for n in capture.graph.nodes if regions.get(n) in indices]
        outputs = tuple(i - bisect(absent, i) for i in unit.outputs)
        own = [by_name[capture.primals[i]] for i in unit.own]
        own += [by_name[tangents[i]] for i in outputs if i in tangents]
        read = dict.fromkeys(s for n in nodes for s in n.all_input_nodes if s.name in capture.constants)
        found.append(_Part(unit, _numbered(nodes), _numbered(own), outputs, _numbered(read)))
    first, middle, last = found
    return first, middle, last


def _numbered(nodes: Iterable[fx.Node]) -> dict[fx.Node, int]:
    return {node: i for i, node in enumerate(nodes)}


def _are_constants_alike(capture: Capture, *parts: _Part) -> bool:
    values = [[capture.constants[n.name] for n in part.constants] for part in parts]
    return all(_is_equal(a, b) for other in values[1:] for a, b in zip_longest(values[0], other))


def _is_equal(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return a is b
    return value_text(a) == value_text(b) and torch.equal(a, b)


def _is_alike(first: _Part, middle: _Part, last: _Part) -> bool:
    """Whether all three compute the same, and those that have the neighbours in question read the same of them."""
    if not len(first.nodes) == len(middle.nodes) == len(last.nodes):
        return False
    for a, m, b in zip(first.nodes, middle.nodes, last.nodes, strict=True):
        if not _look(a) == _look(m) == _look(b):
            return False
        before = _references(a, first, None, middle)
        here = _references(m, middle, first, last)
        after = _references(b, last, middle, None)
        for x, y, z in zip(before, here, after, strict=True):
            if not (x == y or (y[0] == "<" and x[0] == "@")) or not (z == y or (y[0] == ">" and z[0] == "@")):
                return False
    return True


def _look(node: fx.Node) -> tuple[Any, ...]:
    """All of a node but what it reads."""
    value = node.meta.get("val")
    arguments = fx.map_arg((node.args, node.kwargs), lambda _: "%")
    tag = node.meta["partitioner_tag"]
    return node.op, str(node.target), repr(arguments), tag, value_text(value), bounds(value)


def _references(node: fx.Node, part: _Part, before: _Part | None, after: _Part | None) -> list[Reference]:
    found: list[Reference] = []
    fx.map_arg((node.args, node.kwargs), lambda n: found.append(part.reference(n, before, after)))
    return found


def _is_apart(capture: Capture, parts: tuple[_Part, _Part, _Part]) -> bool:
    """Whether nothing but the neighbours reads the middle, and of it come only its outputs and own gradients."""
    first, middle, last = parts
    near = first.nodes.keys() | middle.nodes.keys() | last.nodes.keys()
    if any(user not in near and user.op != "output" for node in middle.nodes for user in node.users):
        return False
    names = {node.name for node in middle.nodes}
    expected = [str(capture.outputs[i]) for i in middle.outputs]
    made = [str(o) for o in capture.outputs if isinstance(o, OutputName) and o in names]
    if made != expected or names & {*(new for _, new in capture.mutations), *capture.effects}:
        return False
    own = {p.name for p in middle.own}
    strange = [g for p, g in capture.gradients.items() if (p in own) != (g in names)]
    # a size that depends on data would be the same in all copies
    given = {s for n in capture.graph.find_nodes(op="placeholder") for s in symbols(n.meta["val"])}
    inside = {s for node in middle.nodes for s in symbols(node.meta.get("val"))}
    return not (strange or inside - given)


def _is_in_order(capture: Capture, parts: tuple[_Part, _Part, _Part]) -> bool:
    """Whether copies of the forward can stand before the last unit, and those of the backward before the middle."""
    _, middle, last = parts
    order = {node: i for i, node in enumerate(capture.graph.nodes)}
    for is_wanted, end in (
        (is_call_of_forward, _start(last, is_call_of_forward)),
        (_is_backward, _start(middle, _is_backward)),
    ):
        if end is None:
            continue
        nodes = [n for n in middle.nodes if is_wanted(n)]
        read = [s for n in nodes for s in n.all_input_nodes if not (_is_backward(n) and s in middle.nodes)]
        if any(order[s] >= order[end] for s in read):
            return False
    return True


def _is_backward(node: fx.Node) -> bool:
    return not is_call_of_forward(node)


def _start(part: _Part, is_wanted: Callable[[fx.Node], bool]) -> fx.Node | None:
    return next((n for n in part.nodes if is_wanted(n)), None)


def _put(capture: Capture, repeats: Repeats, parts: tuple[_Part, _Part, _Part]) -> None:
    first, middle, last = parts
    graph = capture.graph
    by_name = {n.name: n for n in graph.find_nodes(op="placeholder")}
    tangents = [p for p in middle.own if p.name in capture.tangents]
    own = []
    for unit in repeats.left_out:
        with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
            new = [graph.node_copy(t) for t in tangents]
        own.append([by_name[capture.primals[i]] for i in unit.own] + new)
    sequence = 1 + max((n.meta.get("seq_nr", 0) for n in graph.nodes), default=0)
    originals = list(middle.nodes)
    copies: list[dict[int, fx.Node]] = [{} for _ in repeats.left_out]  # by the number of the middle's node

    def source(k: int) -> Callable[[fx.Node], fx.Node]:
        before = originals if k == 0 else copies[k - 1]
        after = list(last.nodes) if k == len(copies) - 1 else copies[k + 1]
        places: dict[str, Any] = {"%": copies[k], "#": own[k], "<": before, ">": after}

        def of(node: fx.Node) -> fx.Node:
            kind, number = middle.reference(node, first, last)
            found: fx.Node = places[kind][number] if kind in places else node
            return found

        return of

    def copy(k: int, nodes: Iterable[fx.Node]) -> None:
        unit, of = repeats.left_out[k], source(k)
        for node in nodes:
            new = graph.node_copy(node, of)
            new.meta = _moved(node.meta, middle.unit, unit, (k + 1) * sequence)
            copies[k][middle.nodes[node]] = new

    with graph.inserting_before(_start(last, is_call_of_forward)):
        for k in range(len(copies)):
            copy(k, filter(is_call_of_forward, originals))
    start = _start(middle, _is_backward)
    if start is not None:
        with graph.inserting_before(start):
            for k in reversed(range(len(copies))):
                copy(k, filter(_is_backward, originals))
    _redirect(last, {node: copies[-1][i] for node, i in middle.nodes.items()})
    _redirect(middle, {node: copies[0][i] for node, i in last.nodes.items()})
    _tell(capture, repeats, middle, own, copies)


def _tell(
    capture: Capture,
    repeats: Repeats,
    middle: _Part,
    own: Sequence[Sequence[fx.Node]],
    copies: Sequence[Mapping[int, fx.Node]],
) -> None:
    """Have a capture name the outputs, tangents and gradients of copies among its own, in the whole graph's order."""
    places = {node.name: i for node, i in middle.nodes.items()}
    gradients = dict(capture.gradients)
    tangents = {i: name for name, i in capture.tangents.items()}
    outputs: dict[int, tuple[Any, str | None]] = {}  # by position in the whole graph, with tangents
    for k, unit in enumerate(repeats.left_out):
        for place, i in zip(unit.outputs, middle.outputs, strict=True):
            mine = next((own[k][j].name for p, j in middle.own.items() if p.name == tangents.get(i)), None)
            outputs[place] = OutputName(copies[k][places[str(capture.outputs[i])]].name), mine
        for p, j in middle.own.items():
            if p.name in capture.gradients:
                gradients[own[k][j].name] = copies[k][places[capture.gradients[p.name]]].name
    rest = iter((o, tangents.get(i)) for i, o in enumerate(capture.outputs))
    whole = [outputs.get(i) or next(rest) for i in range(len(capture.outputs) + len(outputs))]
    capture.outputs = tuple(o for o, _ in whole)
    capture.tangents = {name: i for i, (_, name) in enumerate(whole) if name is not None}
    capture.gradients = {primal: gradients[primal] for primal in capture.primals if primal in gradients}
    by_name = {n.name: n for n in capture.graph.nodes}
    made = [str(o) for o in capture.outputs if isinstance(o, OutputName)] + [new for _, new in capture.mutations]
    results = [by_name[name] for name in (*made, *capture.effects, *capture.gradients.values())]
    output = capture.graph.output_node()
    output.args = (tuple(results),)
    output.meta.pop("desc")


def _redirect(part: _Part, instead: Mapping[fx.Node, Any]) -> None:
    """Have a unit read other nodes."""
    for node in part.nodes:
        if any(n in instead for n in node.all_input_nodes):
            node.args, node.kwargs = fx.map_arg((node.args, node.kwargs), lambda n: instead.get(n, n))


def _moved(meta: dict[str, Any], source: Unit, unit: Unit, sequence: int) -> dict[str, Any]:
    """A node's metadata for another unit: the module, and the number that pairs backward nodes with forward ones."""
    new = {k: v for k, v in meta.items() if k not in ("nn_module_stack", "fwd_nn_module_stack")}
    if "seq_nr" in new:
        new["seq_nr"] += sequence
    path = new.get("module_path")
    if path is not None:
        pairs = zip(source.blocks, unit.blocks, strict=True)
        new["module_path"] = next((b + path[len(a) :] for a, b in pairs if path == a or path.startswith(f"{a}.")), path)
    return new
