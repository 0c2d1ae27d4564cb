"""Decides how slices move through operators that move or copy elements: permutations, views, casts, slices, joins."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from chunkft_fx.graph.rewrite import same, shape
from chunkft_fx.passes.sink_rules.table import Cut, Refused, replaced, rule

aten = torch.ops.aten
prims = torch.ops.prims


@rule(aten.permute.default)
def permute(cut: Cut, node: fx.Node) -> fx.Node:
    """Dimension ``d`` of the result is dimension ``order[d]`` of the operand."""
    x, order = node.args
    assert isinstance(order, (list, tuple))
    return cut.emit(aten.permute.default, cut.take(x, order[cut.dim]), order, like=node)  # type: ignore[arg-type]


@rule(aten.view.default, aten.reshape.default)
def view(cut: Cut, node: fx.Node) -> fx.Node:
    """Sinks where the cut dimension of the view is one dimension of the operand, or the outermost part of one.

    Of merged dimensions and inner parts a slice is no slice of the operand.
    """
    x: Any = node.args[0]
    sizes: Any = node.args[1]
    found = source_dim(shape(x), shape(node), cut.dim)
    if found is None:
        raise Refused("the cut dimension merges dimensions of the viewed value, or is an inner part of one", node)
    source, inner = found
    if inner == 1:
        part = cut.take(x, source)
    else:
        part = cut.take(x, source, cut.emit(aten.mul.Tensor, cut.start, inner, like=node), cut.length * inner)
    # reshape, not view: further down the slice may lose contiguity
    return cut.emit(aten.reshape.default, part, replaced(sizes, cut.dim, cut.length), like=node)


def source_dim(before: tuple[Any, ...], after: tuple[Any, ...], dim: int) -> tuple[int, int] | None:
    """The dimension of a tensor whose indices are those of ``dim`` of its view, and how many make one of them.

    It has as many elements in front of it, and the size of ``dim`` times that of dimensions behind.
    """
    front = product(after[:dim])
    for candidate, size in enumerate(before):
        if not same(product(before[:candidate]), front):
            continue
        for end in range(dim + 1, len(after) + 1):
            inner = product(after[dim + 1 : end])
            if isinstance(inner, int) and same(size, after[dim] * inner):
                return candidate, inner
    return None


def product(sizes: tuple[Any, ...]) -> Any:
    """The product of sizes, 1 of none; an int, or a symbolic size if one of them is."""
    total: Any = 1
    for size in sizes:
        total = total * size
    return total


@rule(aten.expand.default)
def expand(cut: Cut, node: fx.Node) -> fx.Node:
    """An operand is cut along a dimension of its own; one that is broadcast along the cut dimension stays whole."""
    x: Any = node.args[0]
    sizes: Any = node.args[1]
    source = cut.dim - (len(shape(node)) - len(shape(x)))
    is_broadcast = source < 0 or same(shape(x)[source], 1)
    inner = x if is_broadcast else cut.take(x, source)
    return cut.emit(aten.expand.default, inner, replaced(sizes, cut.dim, cut.length), like=node)


@rule(aten.unsqueeze.default)
def unsqueeze(cut: Cut, node: fx.Node) -> fx.Node:
    """Sinks along every dimension but the added one."""
    x: Any = node.args[0]
    added: Any = node.args[1]
    if cut.dim == added:
        raise Refused("the cut dimension is the one that the operator adds", node)
    return cut.emit(aten.unsqueeze.default, cut.take(x, cut.dim - (cut.dim > added)), added, like=node)


@rule(aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default)
def squeeze(cut: Cut, node: fx.Node) -> fx.Node:
    """Sinks along every dimension that is left."""
    x: Any = node.args[0]
    named: Any = node.args[1] if len(node.args) > 1 else range(len(shape(x)))
    removed = {d for d in ([named] if isinstance(named, int) else named) if same(shape(x)[d], 1)}
    kept = [d for d in range(len(shape(x))) if d not in removed]
    # by name: a slice of length 1 must not be removed as well
    return cut.emit(aten.squeeze.dims, cut.take(x, kept[cut.dim]), sorted(removed), like=node)


@rule(aten._to_copy.default, aten.clone.default, prims.convert_element_type.default, aten.lift_fresh_copy.default)
def copy(cut: Cut, node: fx.Node) -> fx.Node:
    """A cast or a copy, whose result has the shape of its operand."""
    assert callable(node.target)
    x, *rest = node.args
    return cut.emit(node.target, cut.take(x, cut.dim), *rest, like=node, **node.kwargs)


@rule(aten.slice.Tensor)
def slice_(cut: Cut, node: fx.Node) -> fx.Node:
    """A static slice: along another dimension it is taken of the part, along the cut one the starts add up."""
    x, dim, start, *rest = [*node.args, *(0, 0)[len(node.args) - 1 :]] if len(node.args) < 3 else list(node.args)
    if dim != cut.dim:
        return cut.emit(aten.slice.Tensor, cut.take(x, cut.dim), dim, start, *rest, like=node)
    step = rest[1] if len(rest) > 1 else 1
    offset = 0 if start is None else start
    if step != 1:
        raise Refused("the operator takes every n-th index along the cut dimension", node)
    if not isinstance(offset, int) or offset < 0:
        raise Refused("the index at which the operator's own slice begins is not known", node)
    moved = cut.emit(aten.add.Tensor, cut.start, offset, like=node)
    return cut.take(x, cut.dim, moved)


@rule(aten.slice_backward.default)
def slice_backward(cut: Cut, node: fx.Node) -> fx.Node:
    """Zeros of ``sizes`` with the gradient at a slice along ``dim``: sinks along every other dimension."""
    gradient, sizes, dim, *rest = node.args
    rank = len(shape(node))
    assert isinstance(dim, int)
    if dim % rank == cut.dim:
        raise Refused("the sliced dimension is the cut one", node)
    inner = cut.take(gradient, cut.dim)
    return cut.emit(aten.slice_backward.default, inner, replaced(sizes, cut.dim, cut.length), dim, *rest, like=node)  # type: ignore[arg-type]


@rule(aten.select.int)
def select(cut: Cut, node: fx.Node) -> fx.Node:
    """One index along ``dim``, which the result does not have: sinks along every dimension of the result."""
    x, dim, index = node.args
    assert isinstance(dim, int)
    source = cut.dim + (cut.dim >= dim)
    return cut.emit(aten.select.int, cut.take(x, source), dim, index, like=node)


@rule(aten.select_backward.default)
def select_backward(cut: Cut, node: fx.Node) -> fx.Node:
    """Zeros of ``sizes`` with the gradient at one index along ``dim``: sinks along every other dimension."""
    gradient, sizes, dim, index = node.args
    assert isinstance(dim, int)
    dim %= len(shape(node))
    if dim == cut.dim:
        raise Refused("one index along the cut dimension was selected", node)
    inner = cut.take(gradient, cut.dim - (cut.dim > dim))
    return cut.emit(aten.select_backward.default, inner, replaced(sizes, cut.dim, cut.length), dim, index, like=node)  # type: ignore[arg-type]


@rule(aten.slice_scatter.default, aten.select_scatter.default)
def scatter(cut: Cut, node: fx.Node) -> fx.Node:
    """A tensor with a slice or one index of it replaced: sinks into both along any other dimension."""
    assert callable(node.target)
    base, part, *place = node.args
    dim: Any = place[0] if place else 0
    dim %= len(shape(node))
    if dim == cut.dim:
        raise Refused("the operator replaces indices along the cut dimension", node)
    source = cut.dim - (cut.dim > dim and node.target is aten.select_scatter.default)
    return cut.emit(node.target, cut.take(base, cut.dim), cut.take(part, source), *place, like=node)


@rule(aten.flip.default, prims.rev.default)
def flip(cut: Cut, node: fx.Node) -> fx.Node:
    """Sinks along every dimension whose order is not reversed."""
    assert callable(node.target)
    x: Any = node.args[0]
    dims: Any = node.args[1]
    if cut.dim in [d % len(shape(node)) for d in dims]:
        raise Refused("the order along the cut dimension is reversed", node)
    return cut.emit(node.target, cut.take(x, cut.dim), dims, like=node)


@rule(aten.roll.default)
def roll(cut: Cut, node: fx.Node) -> fx.Node:
    """Sinks along every dimension that is not rolled; without ``dims`` all elements move on as one vector."""
    x, shifts, *rest = node.args
    dims: Any = rest[0] if rest else []
    if not dims:
        raise Refused("the operator rolls the elements of all dimensions as one vector", node)
    if cut.dim in [d % len(shape(node)) for d in dims]:
        raise Refused("the operator rolls the elements along the cut dimension", node)
    return cut.emit(aten.roll.default, cut.take(x, cut.dim), shifts, dims, like=node)


@rule(aten.cat.default)
def cat(cut: Cut, node: fx.Node) -> fx.Node:
    """Sinks into every part of a join along another dimension than the cut one."""
    parts: Any = node.args[0]
    dim = node.args[1] if len(node.args) > 1 else 0
    if dim == cut.dim:
        raise Refused("the parts are joined along the cut dimension, at places that a slice may cross", node)
    if any(len(shape(p)) != len(shape(node)) for p in parts):
        raise Refused("a joined part has fewer dimensions than the result", node)
    return cut.emit(aten.cat.default, [cut.take(p, cut.dim) for p in parts], dim, like=node)


@rule(aten.constant_pad_nd.default)
def constant_pad_nd(cut: Cut, node: fx.Node) -> fx.Node:
    """Sinks along every dimension that is not padded; ``pad`` lists them from the last one on."""
    x, pad, *rest = node.args
    assert isinstance(pad, (list, tuple))
    before = 2 * (len(shape(node)) - 1 - cut.dim)
    if any(p != 0 for p in pad[before : before + 2]):
        raise Refused("the cut dimension is padded", node)
    return cut.emit(aten.constant_pad_nd.default, cut.take(x, cut.dim), pad, *rest, like=node)
