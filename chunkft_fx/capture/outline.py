"""Cuts the joint graph of a model into regions, and gives equal regions one template.

Contract: regions are contiguous runs of the forward graph's order, so they are convex and each needs
only values of earlier ones. Labels from the recorded module stacks say where to cut; they decide how
good the outline is, never whether it is right. Backward nodes follow the forward node they belong to;
a backward node never runs before a region that feeds it.

A weight gradient that is a sum of contributions from several regions (tied weights) is not summed in
the graph: each region returns its own contribution and the run time adds the slices.
"""

from __future__ import annotations

import functools
import hashlib
import operator
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from chunkft_fx.capture.blocks import label_of, module_path
from chunkft_fx.capture.capture import Capture, OutputName
from chunkft_fx.graph.region import RegionGraph
from chunkft_fx.graph.storages import weight_views
from chunkft_fx.graph.sub_graphs import renamed
from chunkft_fx.head.operators import is_head
from chunkft_fx.torch_internals import graph_module
from chunkft_fx.torch_sizes import hint, symbols

aten = torch.ops.aten


@dataclass(eq=False)
class Template:
    """One distinct region graph; ``key`` is the structural hash that equal regions share."""

    index: int
    key: str
    graph: RegionGraph
    regions: list[int] = field(default_factory=list)

    @functools.cached_property
    def has_head(self) -> bool:
        """Whether a chunked head is part of it."""
        return any(is_head(node) for node in self.graph.graph.nodes)


@dataclass(frozen=True)
class Region:
    """One occurrence of a template. All fields name nodes of the captured joint graph, in template order.

    ``gradients`` pairs each weight-gradient output (they come first among the backward outputs) with
    the primal it is the gradient of; ``values`` are the other backward outputs, wanted by lower regions.
    """

    index: int
    label: str
    template: Template
    primals: tuple[str, ...]
    tangents: tuple[str, ...]
    forward: tuple[str, ...]
    gradients: tuple[tuple[str, str], ...]
    values: tuple[str, ...]


@dataclass(frozen=True)
class Outline:
    """The regions of a capture, in forward order, and its distinct templates."""

    regions: tuple[Region, ...]
    templates: tuple[Template, ...]


def outline(capture: Capture, blocks: Sequence[str]) -> Outline:
    """Cut a capture into regions at the borders of ``blocks`` (see `capture.blocks.block_paths`)."""
    forward, labels = forward_regions(capture, blocks)
    assignment = backward_regions(capture, forward)
    copy_views_that_leave(capture, assignment)
    contributions = _contributions(capture, assignment)
    return _build(capture, labels, assignment, contributions)


def is_call_of_forward(node: fx.Node) -> bool:
    return node.op == "call_function" and node.meta["partitioner_tag"] != "is_backward"


def forward_regions(capture: Capture, blocks: Sequence[str]) -> tuple[dict[fx.Node, int], list[str]]:
    """Assign each forward node to a contiguous segment; segments without a parameter join their neighbour."""
    segments: list[tuple[str, list[fx.Node]]] = []
    for node in capture.graph.nodes:
        if not is_call_of_forward(node):
            continue
        path = module_path(node)
        source = node.args[0] if node.target is operator.getitem else None
        stays = path is None or (isinstance(source, fx.Node) and source.op == "call_function")
        label = segments[-1][0] if stays and segments else label_of(path or "", blocks)
        if not segments or segments[-1][0] != label:
            segments.append((label, []))
        segments[-1][1].append(node)
    parameters = set(capture.parameters)
    merged: list[tuple[str, list[fx.Node]]] = []
    for label, nodes in segments:
        owns = any(n.name in parameters for node in nodes for n in node.all_input_nodes)
        if merged and not owns:
            merged[-1][1].extend(nodes)
        elif (
            merged
            and not merged[-1][0]
            and not any(n.name in parameters for node in merged[-1][1] for n in node.all_input_nodes)
        ):
            merged[-1] = (label, merged[-1][1] + nodes)
        else:
            merged.append((label, nodes))
    assignment = {node: i for i, (_, nodes) in enumerate(merged) for node in nodes}
    return assignment, [
        label or ("input" if i == 0 else "output" if i == len(merged) - 1 else "between")
        for i, (label, _) in enumerate(merged)
    ]


def backward_regions(capture: Capture, forward: dict[fx.Node, int]) -> dict[fx.Node, int]:
    """Extend the assignment to backward nodes: the region of the forward operator a node belongs to.

    Gradient accumulations belong to no operator; they run in the lowest region that feeds them, as
    does every node whose recorded owner is above a region that it needs.
    """
    owner: dict[int, int] = {}
    for node, region in forward.items():
        if "seq_nr" in node.meta:
            owner.setdefault(node.meta["seq_nr"], region)
    assignment = dict(forward)
    top = max(forward.values(), default=0)
    for node in capture.graph.nodes:
        if node.op != "call_function" or node in forward:
            continue
        sources = [assignment[n] for n in node.all_input_nodes if n in assignment and n not in forward]
        lowest = min(sources, default=top)
        if node.target is operator.getitem:
            assignment[node] = assignment[node.all_input_nodes[0]]
            continue
        assignment[node] = min(owner.get(node.meta.get("seq_nr", -1), lowest), lowest)
    return assignment


def copy_views_that_leave(capture: Capture, assignment: dict[fx.Node, int]) -> None:
    """Give other regions a copy of a view of a weight, made where the view is: see `graph.storages.weight_views`."""
    graph = capture.graph
    weights = [n for n in graph.find_nodes(op="placeholder") if n.name in capture.parameters]
    for node in weight_views(graph, weights):
        away = [u for u in node.users if assignment.get(u, assignment[node]) != assignment[node]]
        if not away or not isinstance(node.meta["val"], Tensor):
            continue  # the items of several views are views themselves, and stay with them
        with graph.inserting_after(node):
            copied = graph.call_function(aten.clone.default, (node,))
        copied.meta = dict(node.meta, val=node.meta["val"].clone())
        assignment[copied] = assignment[node]
        for user in away:
            user.replace_input_with(node, copied)


def _contributions(capture: Capture, assignment: dict[fx.Node, int]) -> dict[int, list[tuple[fx.Node, str]]]:
    """For each region the weight gradients it returns: sums over regions are taken apart."""
    by_name = {node.name: node for node in capture.graph.nodes}
    result: dict[int, list[tuple[fx.Node, str]]] = defaultdict(list)
    for primal, name in capture.gradients.items():
        pending = [by_name[name]]
        apart: set[fx.Node] = set()
        while pending:
            node = pending.pop()
            parts = _summands(node, assignment, apart) if primal in capture.parameters else None
            if parts is None:
                result[assignment.get(node, 0)].append((node, primal))
            else:
                apart.add(node)
                pending.extend(reversed(parts))
    return result


def _summands(node: fx.Node, assignment: dict[fx.Node, int], apart: set[fx.Node]) -> list[fx.Node] | None:
    """The two operands of a sum over regions that only the gradient (and sums in ``apart``) needs, else None."""
    if node.target is not aten.add.Tensor or node.kwargs:
        return None
    if any(user.op != "output" and user not in apart for user in node.users):
        return None
    parts = [a for a in node.args if isinstance(a, fx.Node) and a.op == "call_function"]
    if len(parts) != 2 or assignment[parts[0]] == assignment[parts[1]]:
        return None
    values = [p.meta["val"] for p in [*parts, node]]
    alike = all(v.shape == values[2].shape and v.dtype == values[2].dtype for v in values)
    return parts if alike else None


def _build(
    capture: Capture,
    labels: list[str],
    assignment: dict[fx.Node, int],
    contributions: dict[int, list[tuple[fx.Node, str]]],
) -> Outline:
    alive = _alive(capture, contributions)
    members: dict[int, list[fx.Node]] = defaultdict(list)
    for node in capture.graph.nodes:
        if node in assignment and node in alive:
            members[assignment[node]].append(node)
    outside = {str(o) for o in capture.outputs if isinstance(o, OutputName)} | {name for _, name in capture.mutations}
    outside |= set(capture.effects)
    symbol_nodes = {
        str(n.meta["val"]): n
        for n in capture.graph.find_nodes(op="placeholder")
        if isinstance(n.meta["val"], torch.SymInt)
    }
    split = {
        n
        for n in alive
        if n in assignment and any(assignment.get(u, assignment[n]) != assignment[n] for u in n.users if u in alive)
    }
    templates: dict[str, Template] = {}
    regions: list[Region] = []
    for index in range(len(labels)):
        nodes = members[index]
        inside = set(nodes)
        gradients = contributions.get(index, [])
        used = sorted({s for node in nodes for s in symbols(node.meta.get("val"))})
        # In the order of first use, so that equal regions list equal inputs at equal places.
        candidates = [n for node in nodes for n in node.all_input_nodes] + [
            n for n, _ in gradients if n.op == "placeholder"
        ]
        inputs = [
            n
            for n in dict.fromkeys([*candidates, *(symbol_nodes[s] for s in used if s in symbol_nodes)])
            if n not in inside
        ]
        primals = [n for n in inputs if not _comes_late(n, index, assignment, capture)]
        tangents = [n for n in inputs if _comes_late(n, index, assignment, capture)]
        forward = [n for n in nodes if is_call_of_forward(n) and (n in split or n.name in outside)]
        values = [n for n in nodes if not is_call_of_forward(n) and n in split]
        graph = _extract(capture, nodes, primals, tangents, forward, [n for n, _ in gradients] + values)
        key = structural_key(graph)
        template = templates.setdefault(key, Template(len(templates), key, graph))
        template.regions.append(index)
        regions.append(
            Region(
                index, labels[index], template,
                tuple(n.name for n in primals), tuple(n.name for n in tangents), tuple(n.name for n in forward),
                tuple((n.name, primal) for n, primal in gradients), tuple(n.name for n in values),
            )
        )  # fmt: skip
    return Outline(tuple(regions), tuple(templates.values()))


def _alive(capture: Capture, contributions: dict[int, list[tuple[fx.Node, str]]]) -> set[fx.Node]:
    """Nodes that an output or a gradient contribution needs; the taken-apart sums are not among them."""
    by_name = {node.name: node for node in capture.graph.nodes}
    pending = [node for parts in contributions.values() for node, _ in parts]
    pending += [by_name[str(o)] for o in capture.outputs if isinstance(o, OutputName)]
    pending += [by_name[name] for _, name in capture.mutations] + [by_name[name] for name in capture.effects]
    alive: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if node not in alive:
            alive.add(node)
            pending.extend(node.all_input_nodes)
    return alive


def _comes_late(node: fx.Node, region: int, assignment: dict[fx.Node, int], capture: Capture) -> bool:
    """True for an input that exists only once the region's backward starts."""
    if node.name in capture.tangents:
        return True
    if node.op == "placeholder":
        return False
    return not is_call_of_forward(node) or assignment[node] > region


def _extract(
    capture: Capture,
    nodes: list[fx.Node],
    primals: list[fx.Node],
    tangents: list[fx.Node],
    forward: list[fx.Node],
    backward: list[fx.Node],
) -> RegionGraph:
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for kind, tag, sources in (("primal", "is_forward", primals), ("tangent", "is_backward", tangents)):
        for i, source in enumerate(sources):
            node = graph.placeholder(f"{kind}s_{i}")
            is_parameter = source.name in capture.parameters
            node.meta = {"val": source.meta["val"], "kind": kind, "partitioner_tag": tag, "is_parameter": is_parameter}
            env[source] = node
    for source in nodes:
        env[source] = graph.node_copy(source, env.__getitem__)
    graph.output(tuple(env[n] for n in [*forward, *backward]))
    return RegionGraph(graph_module({}, graph), len(forward))


def structural_key(region: RegionGraph) -> str:
    """A hash of operators, arguments, shapes, dtypes, strides, devices, tags and outputs; names do not count.

    Nor do the names of sizes that depend on data: each block that selects by a mask makes one of its own.
    """
    numbers: dict[fx.Node, int] = {}
    sizes: dict[str, str] = {}
    digest = hashlib.sha256(str(region.num_forward_outputs).encode())
    for i, node in enumerate(region.graph.nodes):
        numbers[node] = i
        args = fx.map_arg((node.args, node.kwargs), _numbering(numbers))
        kind = (node.meta.get("kind"), node.meta.get("partitioner_tag"), node.meta.get("is_parameter"))
        called = str(node.target) if node.op == "call_function" else ""
        text = f"{(node.op, called, args, kind)!r}{value_text(node.meta.get('val'))}{bounds(node.meta.get('val'))}"
        digest.update(renamed(text, sizes).encode())
    return digest.hexdigest()[:16]


def bounds(value: Any) -> list[int]:
    """The numbers that the symbolic sizes of a value stand for where memory is predicted."""
    sizes = value.shape if isinstance(value, Tensor) else (value,)
    return [hint(s) for s in sizes if isinstance(s, torch.SymInt)]


def _numbering(numbers: dict[fx.Node, int]) -> Callable[[fx.Node], Any]:
    return lambda node: f"%{numbers[node]}"


def value_text(value: Any) -> str:
    """A value's dtype, shape, strides and device as text, such as ``bf16[8, s0] (s0, 1) cuda:0``."""
    if isinstance(value, Tensor):
        strides = tuple(value.stride()) if value.layout is torch.strided else ()
        return f"{value.dtype}{list(value.shape)}{strides}{value.device}"
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(value_text(v) for v in value) + ")"
    return repr(value)
