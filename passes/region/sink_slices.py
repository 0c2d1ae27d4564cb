"""sink_slices: move each slice through the operators that produce its value, towards the leaves.

Contract: outputs stay equal up to the order of sums. A slice moves only through operators with a rule
(`sink_rules`), and only while nobody else needs the whole value: slicing what is there anyway is free.
A gradient whose slice gets stuck before any summation is still right, but computed whole; it is
reported in ``region.dense``.

Terms: an operator *contracts* if it sums (``mm``, ``sum``, embedding backward): below it operands are
activations, not a dense gradient.

Before::

    permute: "f32[16, 1024]" = aten.permute(dy, [1, 0])
    mm: "f32[16, 64]" = aten.mm(permute, x)
    narrow: "f32[4, 64]" = chunkft_fx.narrow(mm, 0, start_0, 4)

After::

    narrow: "f32[1024, 4]" = chunkft_fx.narrow(dy, 1, start_0, 4)
    permute: "f32[4, 1024]" = aten.permute(narrow, [1, 0])
    mm: "f32[4, 64]" = aten.mm(permute, x)
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, fx

from chunkft_fx.capture.blocks import module_path
from chunkft_fx.graph.ops import narrow
from chunkft_fx.graph.region import DenseGradient, RegionGraph
from chunkft_fx.graph.rewrite import fake_value, same, shape, tensor_nbytes
from chunkft_fx.passes.sink_rules import ITEM_RULES, SPLITS, Cut, Rule, rule_for
from chunkft_fx.torch_internals import is_erased


@dataclass(frozen=True)
class SinkSlices:
    """Sink every slice as far as rules allow, and report the gradients that stay dense."""

    name: str = "sink_slices"
    numerics: Literal["bitwise", "reassociated"] = "reassociated"

    def __call__(self, region: RegionGraph) -> int:
        pending = [n for n in region.graph.nodes if n.target is narrow]
        sunk = 0
        while pending:
            # The latest value first: whatever else reads it has then moved away already, or never will.
            part = max(pending, key=_source)
            pending.remove(part)
            part = _merge_equal(part, pending)
            replacement = _sink(part)
            if isinstance(replacement, str):
                _report(region, part, replacement)
                continue
            new, taken = replacement
            source = _source(part)
            part.replace_all_uses_with(new)
            region.graph.erase_node(part)
            _erase_unused(source)
            pending.extend(taken)
            sunk += 1
        _refresh(region.graph)
        return sunk


def _source(part: fx.Node) -> fx.Node:
    source = part.args[0]
    assert isinstance(source, fx.Node)
    return source


def _merge_equal(part: fx.Node, pending: list[fx.Node]) -> fx.Node:
    """Let one slice stand for all equal ones, and take those off the list."""
    for twin in [n for n in pending if n.args == part.args]:
        pending.remove(twin)
        is_contracted = bool(part.meta.get("contracted") and twin.meta.get("contracted"))
        kept, other = (part, twin) if part < twin else (twin, part)
        other.replace_all_uses_with(kept)
        other.graph.erase_node(other)
        kept.meta["contracted"] = is_contracted
        part = kept
    return part


def _sink(part: fx.Node) -> tuple[fx.Node, list[fx.Node]] | str:
    """The replacement of a slice and the new slices it is made of, or why the slice stays where it is."""
    x, dim, start, length = part.args
    assert isinstance(x, fx.Node) and isinstance(dim, int) and isinstance(start, fx.Node) and isinstance(length, int)
    if x.op != "call_function":
        return "it is an input of the region"
    if any(user.target is not narrow for user in x.users):
        return "the whole value is needed elsewhere"
    found = _rule(x)
    if isinstance(found, str):
        return found
    is_contracted = bool(part.meta.get("contracted")) or found.contracts
    cut = Cut(part, dim, start, length, part.meta["output"], is_contracted)
    new = found.function(cut, x)
    if new is None or not _equal_form(new, part):
        for node in reversed(cut.taken):
            _erase_unused(node)
        return f"the rule of {_operator(x)} does not hold for a slice along dimension {dim}"
    return new, cut.taken


def _operator(x: fx.Node) -> Any:
    """The operator that computes a value, seen through getitem."""
    return x.all_input_nodes[0].target if x.target is operator.getitem else x.target


def _rule(x: fx.Node) -> Rule | str:
    if x.target is not operator.getitem:
        return rule_for(x.target) or f"{x.target} has no rule"
    producer = x.all_input_nodes[0]
    if producer.target not in ITEM_RULES:
        return f"{producer.target} has no rule"
    input_gradient_read = any(user.args[1] == 0 for user in producer.users)
    if input_gradient_read and producer.target not in SPLITS:
        return "the operator is needed whole for the input gradient"
    return ITEM_RULES[producer.target]


def _equal_form(new: fx.Node, part: fx.Node) -> bool:
    """A replacement of another shape or dtype would be a wrong rule: never use it."""
    a, b = new.meta["val"], part.meta["val"]
    return bool(a.dtype == b.dtype and a.ndim == b.ndim and all(map(same, a.shape, b.shape)))


def _report(region: RegionGraph, part: fx.Node, reason: str) -> None:
    x: Any = part.args[0]
    if part.meta.get("contracted") or x.op != "call_function" or not isinstance(x.meta["val"], Tensor):
        return
    shared = any(user.target is not narrow for user in x.users) or reason.startswith("the operator is needed whole")
    if shared or not _is_gradient(x):
        return
    dense = DenseGradient(
        part.meta["output"], str(_operator(x)), module_path(x) or "", tensor_nbytes(x.meta["val"]), reason
    )
    region.dense.append(dense)


def _is_gradient(x: fx.Node) -> bool:
    """True if a tangent flows into the value: forward values and constants are no dense gradients."""
    pending, seen = [x], {x}
    while pending:
        node = pending.pop()
        if node.meta.get("kind") == "tangent":
            return True
        pending.extend(n for n in node.all_input_nodes if n not in seen)
        seen.update(node.all_input_nodes)
    return False


def _erase_unused(node: fx.Node) -> None:
    """Erase a node without users, and then what only it needed, so that sharing is seen as it is."""
    pending = [node]
    while pending:
        current = pending.pop()
        if current.users or current.op != "call_function" or current.graph is None or is_erased(current):
            continue
        operands = current.all_input_nodes
        current.graph.erase_node(current)
        pending.extend(operands)


def _refresh(graph: fx.Graph) -> None:
    """Recompute the values of new nodes: a slice that moved further down may have changed strides above it."""
    for node in graph.nodes:
        if node.target is narrow or node.meta.get("rewritten"):
            shape_before = shape(node) if isinstance(node.meta["val"], Tensor) else None
            node.meta["val"] = fake_value(node)
            assert shape_before is None or all(map(same, shape_before, shape(node)))
