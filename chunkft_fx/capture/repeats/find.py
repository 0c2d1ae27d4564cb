"""Finds equal blocks that stand side by side in Dynamo's graph, and writes the graph without most of them.

Blocks are equal if they call the same functions on the same arguments, where an argument of the block before, and a
weight that no other block reads, counts as the same if it stands at the same place and looks the same. Blocks of two
kinds that take turns are equal in pairs: a *unit* is the least run of blocks that repeats.

    before: embed, 0, 1, 2, ..., 30, 31, head
    after:  embed, 0, 1, 31, head                    first = 0, middle = 1, last = 31, left out = 2 to 30

The first of them may read other values of what ran before it than the others read of each other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from chunkft_fx.capture.blocks import innermost, label_of
from chunkft_fx.capture.outline import value_text

# Blocks that take turns are looked for up to this many kinds; Gemma 3 has one of another kind after every five.
MOST_KINDS = 8
# Leaving out fewer blocks is not worth the comparisons.
LEAST_LEFT_OUT = 2


@dataclass(frozen=True)
class Unit:
    """Blocks by their paths, and the positions of the graph's inputs that only they read, in the order of first use.

    ``outputs`` are the positions of the graph's outputs that they make.
    """

    blocks: tuple[str, ...]
    own: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class Repeats:
    """Equal units in the order they run: those ``left_out`` of a shortened graph stood between middle and last."""

    first: Unit
    middle: Unit
    last: Unit
    left_out: tuple[Unit, ...]


@dataclass
class _Segment:
    """A run of nodes of one block (``""`` for none); ``own`` are the inputs that only it reads.

    ``outputs`` are the positions of the graph's outputs that it makes.
    """

    label: str
    nodes: list[fx.Node] = field(default_factory=list)
    own: dict[fx.Node, int] = field(default_factory=dict)
    outputs: dict[int, fx.Node] = field(default_factory=dict)

    @property
    def inside(self) -> dict[fx.Node, int]:
        return {node: i for i, node in enumerate(self.nodes)}


def without_repeats(
    gm: fx.GraphModule, inputs: Sequence[Any], modules: Iterable[tuple[str, torch.nn.Module]], blocks: Sequence[str]
) -> tuple[fx.GraphModule, Repeats] | None:
    """A shorter graph, and what it leaves out; None where too few blocks are equal, or others than the next read them.

    The shorter graph has all inputs of the whole one, and its outputs but those that units make that are left out.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    segments = _segments(gm.graph, modules, blocks)
    looks = {p: _look_of_input(p, value) for p, value in zip(placeholders, inputs, strict=True)}
    keys = _keys(segments, looks)
    place = _longest(keys)
    if place is None:
        return None
    start, kinds, count = place
    if _is_one_more(segments, keys, looks, start, kinds):
        start, count = start - kinds, count + 1
    units = [segments[start + i * kinds : start + (i + 1) * kinds] for i in range(count)]
    # the gradient of what all units read is summed in all of them but the last, which so is another graph
    if any(_is_differentiable(n) for i in range(start + kinds, start + 2 * kinds) for n in _far(segments, i)):
        units.pop()
    middle, left_out, last = units[1], units[2:-1], units[-1]
    ends = range(start + kinds, start + (len(units) - 1) * kinds)
    if len(left_out) * kinds < LEAST_LEFT_OUT or not all(_is_read_by_next(segments, i) for i in ends):
        return None
    position = {p: i for i, p in enumerate(placeholders)}

    def unit(parts: Sequence[_Segment]) -> Unit:
        own, outputs = tuple(position[p] for s in parts for p in s.own), tuple(i for s in parts for i in s.outputs)
        return Unit(tuple(s.label for s in parts), own, outputs)

    repeats = Repeats(unit(units[0]), unit(middle), unit(last), tuple(map(unit, left_out)))
    return _shortened(gm, left_out, middle[-1]), repeats


def _segments(graph: fx.Graph, modules: Iterable[tuple[str, torch.nn.Module]], blocks: Sequence[str]) -> list[_Segment]:
    paths = {str(id(module)): name for name, module in modules}
    segments: list[_Segment] = []
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        path = innermost(node, paths)
        label = segments[-1].label if path is None and segments else label_of(path or "", blocks)
        if not segments or segments[-1].label != label:
            segments.append(_Segment(label))
        segments[-1].nodes.append(node)
    within = {node: s for s in segments for node in s.nodes}
    for p in graph.find_nodes(op="placeholder"):
        readers = {id(within[u]): within[u] for u in p.users if u in within}
        if len(readers) == 1 and all(u in within for u in p.users):
            (reader,) = readers.values()
            reader.own[p] = -1
    for s in segments:
        used = dict.fromkeys(n for node in s.nodes for n in node.all_input_nodes if n in s.own)
        s.own = {p: i for i, p in enumerate(used)}
    for i, value in enumerate(_outputs(graph)):
        if value in within:
            within[value].outputs[i] = value
    return segments


def _outputs(graph: fx.Graph) -> Sequence[Any]:
    (values,) = graph.output_node().args
    assert isinstance(values, (tuple, list)), "Dynamo's graphs return a flat tuple"
    return values


def _keys(segments: Sequence[_Segment], looks: Mapping[fx.Node, str]) -> list[Hashable]:
    """For each segment all that it computes, and of what; what can never be equal gets a key of its own."""
    called = Counter(s.label for s in segments)
    keys: list[Hashable] = []
    for i, s in enumerate(segments):
        is_plain = all(node.op in ("call_function", "call_method") for node in s.nodes)
        is_block = s.label != "" and called[s.label] == 1 and i > 0
        keys.append(_key(s, segments[i - 1], looks) if is_block and is_plain else object())
    return keys


def _key(segment: _Segment, before: _Segment | None, looks: Mapping[fx.Node, str]) -> Hashable:
    """All that a segment computes, and of what; without the segment before it, only what that looks like."""
    inside, earlier = segment.inside, before.inside if before else {}

    def reference(node: fx.Node) -> str:
        if node in inside:
            return f"%{inside[node]}"
        if node in earlier:
            return f"<{earlier[node]} {_look(node)}"
        if before is None and node not in segment.own:
            return f"? {_look(node)}"
        return f"#{segment.own[node]}" if node in segment.own else f"@{node.name}"

    calls = tuple(
        (node.op, _callee(node.target), repr(fx.map_arg((node.args, node.kwargs), reference)), _look(node))
        for node in segment.nodes
    )
    return calls, tuple(looks[p] for p in segment.own), tuple(inside[n] for n in segment.outputs.values())


def _is_one_more(
    segments: Sequence[_Segment], keys: Sequence[Hashable], looks: Mapping[fx.Node, str], start: int, kinds: int
) -> bool:
    """Whether the unit before equal ones differs from them in nothing but the values that its first block reads."""
    before = start - kinds
    if before < 0 or not isinstance(keys[before], tuple) or keys[before + 1 : start] != keys[start + 1 : start + kinds]:
        return False
    is_alike = _key(segments[before], None, looks) == _key(segments[start], None, looks)
    return is_alike and all(_is_read_by_next(segments, i) for i in range(start, start + kinds))


def _callee(target: Any) -> Hashable:
    return target if isinstance(target, str) else (id(target), str(target))


def _look(node: fx.Node) -> str:
    value = node.meta.get("example_value")
    return f"{value_text(value)} {_is_differentiable(node)}"


def _look_of_input(node: fx.Node, value: Any) -> str:
    return f"{type(value).__name__} {_look(node)}"


def _is_differentiable(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, Tensor) and value.requires_grad


def _far(segments: Sequence[_Segment], index: int) -> set[fx.Node]:
    """What a segment reads that is neither its own nor made by the segment before."""
    segment, earlier = segments[index], segments[index - 1].inside
    near = segment.inside.keys() | segment.own.keys() | earlier.keys()
    return {n for node in segment.nodes for n in node.all_input_nodes} - near


def _longest(keys: Sequence[Hashable]) -> tuple[int, int, int] | None:
    """Where keys repeat: the first, how many make a unit, and how many units there are; those that cover most keys."""
    best, place = 0, None
    for kinds in range(1, MOST_KINDS + 1):
        start = 0
        for i in range(kinds, len(keys) + 1):
            if i < len(keys) and keys[i] == keys[i - kinds]:
                continue
            count = (i - start) // kinds
            if (count - 3) * kinds > best:
                best, place = (count - 3) * kinds, (start, kinds, count)
            start = i - kinds + 1
    return place


def _is_read_by_next(segments: Sequence[_Segment], index: int) -> bool:
    """Whether nothing reads a segment's values but itself, the next one and the caller."""
    near = segments[index].inside.keys() | segments[index + 1].inside.keys()
    return all(user in near or user.op == "output" for node in segments[index].nodes for user in node.users)


def _shortened(gm: fx.GraphModule, left_out: Sequence[Sequence[_Segment]], before: _Segment) -> fx.GraphModule:
    """The graph without some units; what follows reads of the segment ``before`` them what it read of their last."""
    dropped = {node for unit in left_out for s in unit for node in s.nodes}
    instead = dict(zip(left_out[-1][-1].nodes, before.nodes, strict=True))
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in gm.graph.nodes:
        if node.op != "output" and node not in dropped:
            copies[node] = graph.node_copy(node, lambda n: copies[instead.get(n, n)])
    kept = tuple(v for v in _outputs(gm.graph) if v not in dropped)
    graph.output(fx.map_arg(kept, copies.__getitem__))
    return fx.GraphModule(gm, graph)
