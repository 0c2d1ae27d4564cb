"""sink_slices: move each slice through the operators that produce its value, towards the leaves.

Contract: outputs stay equal up to the order of sums. A slice moves only through operators with a rule
(`sink_rules`), and only while nobody else needs the whole value: slicing what is there anyway is free.
A gradient whose slice is refused before any summation is still right, but computed whole; it is
reported in ``region.dense``, with the node that the slice stays behind and the reason (`Refused`).

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
from typing import Literal

from torch import Tensor, fx

from chunkft_fx.capture.blocks import module_path
from chunkft_fx.graph.ops import narrow
from chunkft_fx.graph.region import DenseGradient, RegionGraph
from chunkft_fx.graph.rewrite import fake_value, same, shape, tensor_nbytes
from chunkft_fx.passes.sink_rules import RULES, Cut, Refused, Rule, rule_for
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
            try:
                new, taken = _sink(part)
            except Refused as refused:
                _report(region, part, refused)
                continue
            source = _source(part)
            part.replace_all_uses_with(new)
            region.graph.erase_node(part)
            _erase_unused(source)
            pending.extend(taken)
            sunk += 1
        _refresh(region.graph)
        return sunk


class _AtHand(Refused):
    """The whole value is there anyway, so that slicing it costs nothing: no reason to report a dense gradient."""


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


def _sink(part: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """The replacement of a slice, and the new slices it is made of; raises `Refused` where the slice has to stay."""
    x, dim, start, length = part.args
    assert isinstance(x, fx.Node) and isinstance(dim, int) and isinstance(start, fx.Node) and isinstance(length, int)
    found = _rule(x)
    is_contracted = bool(part.meta.get("contracted")) or found.contracts
    cut = Cut(part, dim, start, length, part.meta["output"], is_contracted)
    try:
        new = found.function(cut, x)
        if not _equal_form(new, part):
            raise Refused("the rule made a value of another shape or dtype, which is a defect of the rule", x)
    except Refused:
        cut.discard()
        raise
    return new, cut.taken


def _rule(x: fx.Node) -> Rule:
    """The rule by which a slice of a value may move; raises `Refused` if there is none, or no use in moving."""
    if x.op != "call_function":
        raise _AtHand("the value is an input of the region", x)
    if any(user.target is not narrow for user in x.users):
        raise _AtHand("the whole value is needed elsewhere", x)
    operator_node = _operator(x)
    found = rule_for(x.target) if operator_node is x else RULES.get(operator_node.target)
    if found is None:
        raise Refused("no rule is known for this operator", operator_node)
    if operator_node is not x and not found.is_separable and any(u.args[1] == 0 for u in operator_node.users):
        raise _AtHand("the operator is needed whole for the input gradient", operator_node)
    return found


def _operator(x: fx.Node) -> fx.Node:
    """The node of the operator that computes a value: of a value read by ``getitem``, the operator it is read from."""
    return x.all_input_nodes[0] if x.target is operator.getitem else x


def _equal_form(new: fx.Node, part: fx.Node) -> bool:
    """A replacement of another shape or dtype would be a wrong rule: never use it."""
    a, b = new.meta["val"], part.meta["val"]
    return bool(a.dtype == b.dtype and a.ndim == b.ndim and all(map(same, a.shape, b.shape)))


def _report(region: RegionGraph, part: fx.Node, refused: Refused) -> None:
    """Add a weight gradient that stays dense to ``region.dense``: not what a sum reads, and no forward value."""
    x = _source(part)
    if isinstance(refused, _AtHand) or part.meta.get("contracted") or not isinstance(x.meta["val"], Tensor):
        return
    if not _is_gradient(x):
        return
    node = _operator(refused.node)
    nbytes = tensor_nbytes(x.meta["val"])
    dense = DenseGradient(
        part.meta["output"], str(node.target), node.name, module_path(x) or "", nbytes, refused.reason
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
