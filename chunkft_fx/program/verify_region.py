"""Checks the invariants of a region graph, after every pass in tests and on demand.

A violation is a defect of a pass; the message names the pass and the node.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from chunkft_fx.errors import VerificationError
from chunkft_fx.graph.region import Pass, RegionGraph, SliceDemand
from chunkft_fx.graph.rewrite import fake_value, same
from chunkft_fx.head import operators as head
from chunkft_fx.torch_internals import tree_leaves, writes_memory
from chunkft_fx.torch_sizes import hint

_KINDS = ("primal", "tangent", "start")


@dataclass(frozen=True)
class OutputForm:
    """Shape, dtype and device of one output, or None where there is none."""

    shape: tuple[Any, ...]
    dtype: torch.dtype | None
    device: torch.device | None


def describe_outputs(region: RegionGraph) -> tuple[OutputForm | None, ...]:
    """The form of each output, to be compared after a pass."""
    return tuple(None if n is None else _form(n.meta["val"]) for n in region.outputs)


def _form(value: Any) -> OutputForm:
    if isinstance(value, Tensor):
        return OutputForm(tuple(value.shape), value.dtype, value.device)
    return OutputForm((), None, None)


def verify(region: RegionGraph, before: tuple[OutputForm | None, ...], step: Pass) -> None:
    """Raise `VerificationError` unless the graph is well formed and its outputs keep the form they had."""

    def fail(problem: str) -> None:
        raise VerificationError(f"after {step.name}: {problem}")

    try:
        region.graph.lint()
    except (RuntimeError, AssertionError) as error:
        fail(f"the graph is not in order: {error}")
    _check_placeholders(region, fail)
    backward: set[fx.Node] = set()
    for node in region.graph.nodes:
        if node.op == "output":
            continue
        if "val" not in node.meta or "partitioner_tag" not in node.meta:
            fail(f"{node.name} lacks a value or a tag")
        if node.op == "placeholder":
            if node.meta["kind"] != "primal":
                backward.add(node)
            continue
        if node.op != "call_function":
            fail(f"{node.name} is a {node.op}; only operators are allowed")
        if writes_memory(node.target):
            fail(f"{node.name} writes memory: {node.target}")
        if any(source in backward and not _is_early(source, node) for source in node.all_input_nodes):
            backward.add(node)
            if node.meta["partitioner_tag"] != "is_backward":
                fail(f"{node.name} needs backward values but is tagged {node.meta['partitioner_tag']}")
        _check_value(node, fail)
    for i, value in enumerate(region.outputs[: region.num_forward_outputs]):
        if value is None or value in backward:
            fail(f"forward output {i} is missing or depends on backward inputs")
    _check_outputs(region, before, step, fail)


def _is_early(source: fx.Node, node: fx.Node) -> bool:
    """Whether a node may read this start in the forward: a head makes its gradients there."""
    return node.target is head.grad and source.meta.get("kind") == "start"


def _check_placeholders(region: RegionGraph, fail: Any) -> None:
    kinds = [n.meta.get("kind") for n in region.graph.find_nodes(op="placeholder")]
    if any(kind not in _KINDS for kind in kinds):
        fail(f"placeholders are of the kinds {', '.join(_KINDS)}, not {kinds}")
    order = [_KINDS.index(kind) for kind in kinds]
    if order != sorted(order):
        fail("placeholders must come as primals, tangents, starts")
    nodes = list(region.graph.nodes)
    if any(n.op == "placeholder" for n in nodes[len(order) :]):
        fail("a placeholder stands behind an operator")
    for start in region.placeholders("start"):
        value = start.meta["val"]
        if value.ndim != 0 or value.dtype != torch.int64 or value.device.type != "cpu":
            fail(f"{start.name} must be an i64[] on the CPU")


@dataclass(frozen=True)
class _Checked:
    """One check of a value. It holds what was looked at, so that nothing else can have the same identity meanwhile."""

    target: Any
    operands: str
    """Operands as they are written, values of nodes by their identity."""

    values: tuple[Any, ...]
    feeds_view: bool

    def covers(self, other: _Checked) -> bool:
        """Whether the other check would look at the same again."""
        return (
            self.target is other.target
            and self.operands == other.operands
            and all(a is b for a, b in zip(self.values, other.values, strict=True))
            and self.feeds_view >= other.feeds_view
        )


def _check_value(node: fx.Node, fail: Any) -> None:
    """The recorded value must be what the operator gives for the recorded operands.

    Most nodes stay as they are in most passes, and running an operator on fake values takes half a millisecond.
    """
    values = (node.meta["val"], *(n.meta.get("val") for n in node.all_input_nodes))
    operands = repr(fx.map_arg((node.args, node.kwargs), lambda n: f"value {id(n.meta.get('val'))}"))
    feeds_view = any(user.target is torch.ops.aten.view.default for user in node.users)
    check = _Checked(node.target, operands, values, feeds_view)
    if "checked" in node.meta and node.meta["checked"].covers(check):
        return
    _compare_value(node, feeds_view, fail)
    node.meta["checked"] = check


def _compare_value(node: fx.Node, feeds_view: bool, fail: Any) -> None:
    try:
        fresh = fake_value(node)
    except Exception as error:
        fail(f"{node.name} = {node.target} does not accept its operands: {error}")
    recorded = tree_leaves(node.meta["val"])
    for a, b in zip(tree_leaves(fresh), recorded, strict=True):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            continue
        if a.ndim != b.ndim or not all(map(_alike, a.shape, b.shape)) or a.dtype != b.dtype or a.device != b.device:
            fail(f"{node.name} is recorded as {b.dtype}{list(b.shape)} but gives {a.dtype}{list(a.shape)}")
        if feeds_view and not _same_strides(a, b):
            fail(f"{node.name} feeds a view and is recorded with strides {b.stride()} but has {a.stride()}")


def _same_strides(a: Tensor, b: Tensor) -> bool:
    """Strides of dimensions of size 1 are never used."""
    pairs = zip(a.shape, a.stride(), b.stride(), strict=True)
    return all(same(size, 1) or _alike(x, y) for size, x, y in pairs)


def _alike(a: Any, b: Any) -> bool:
    # an unbacked or re-derived symbol may be spelled differently; its traced value is the same
    return same(a, b) or hint(a) == hint(b)


def _check_outputs(region: RegionGraph, before: tuple[OutputForm | None, ...], step: Pass, fail: Any) -> None:
    after = describe_outputs(region)
    if len(after) != len(before):
        fail(f"{len(before)} outputs became {len(after)}")
    demand = getattr(step, "demand", None)
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        if new is None or old is None:
            if new is not None:
                fail(f"output {i} appeared from nowhere")
            may_vanish = demand is not None or step.name == "prune_tangents"
            if old is not None and not may_vanish:
                fail(f"output {i} was dropped")
            continue
        wanted = old
        if demand is not None and i >= region.num_forward_outputs:
            asked = demand[i - region.num_forward_outputs]
            if isinstance(asked, SliceDemand):
                sizes = tuple(asked.length if d == asked.dim else s for d, s in enumerate(old.shape))
                wanted = OutputForm(sizes, old.dtype, old.device)
        if i >= region.num_forward_outputs and getattr(step, "widens_gradients", False):
            wanted = _widened(wanted, new)
        if wanted.dtype != new.dtype or len(wanted.shape) != len(new.shape) or wanted.device != new.device:
            fail(f"output {i} was {wanted} and is {new}")
        if not all(map(_alike, wanted.shape, new.shape)):
            fail(f"output {i} was {wanted} and is {new}")


def _widened(old: OutputForm, new: OutputForm) -> OutputForm:
    """The form of a gradient that a pass may have widened to the dtype in which gradients are added up."""
    if old.dtype is None or new.dtype != torch.promote_types(old.dtype, torch.float32):
        return old
    return OutputForm(old.shape, new.dtype, old.device)
