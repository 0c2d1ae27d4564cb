"""Decides how slices move through operators that add or take rows: embedding backward, index_put, scatter_add, index.

Where rows are added along the cut dimension, indices outside the slice must be dropped. They are sent to one extra row
behind the slice, which is then cut off, so that nothing has to be known about them at compile time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from chunkft_fx.graph.rewrite import same, shape
from chunkft_fx.passes.sink_rules.table import Cut, Refused, replaced, rule

aten = torch.ops.aten


def moved_indices(cut: Cut, indices: Any, like: fx.Node, size: Any = None) -> fx.Node:
    """Indices relative to the slice's start; those outside it, or equal to nothing in it, become ``length``.

    ``size`` is given where negative indices count from the end.
    """
    if size is not None:
        wrapped = cut.emit(aten.add.Tensor, indices, size, like=like)
        negative = cut.emit(aten.lt.Scalar, indices, 0, like=like)
        indices = cut.emit(aten.where.self, negative, wrapped, indices, like=like)
    relative = cut.emit(aten.sub.Tensor, indices, cut.start, like=like)
    above = cut.emit(aten.ge.Scalar, relative, 0, like=like)
    below = cut.emit(aten.lt.Scalar, relative, cut.length, like=like)
    inside = cut.emit(aten.logical_and.default, above, below, like=like)
    return cut.emit(aten.where.self, inside, relative, _extra_row(cut, relative, like), like=like)


def _extra_row(cut: Cut, indices: fx.Node, like: fx.Node) -> fx.Node:
    """The index behind the slice, of the indices' dtype; Inductor lowers ``full`` in every version."""
    value = indices.meta["val"]
    return cut.emit(aten.full.default, [], cut.length, dtype=value.dtype, device=value.device, like=like)


def without_last(cut: Cut, node: fx.Node, dim: int) -> fx.Node:
    """A value without the extra row behind the slice along ``dim``: ``length`` indices are left."""
    return cut.emit(aten.slice.Tensor, node, dim, 0, cut.length, like=node)


@rule(aten.embedding_dense_backward.default, contracts=True)
def embedding_dense_backward(cut: Cut, node: fx.Node) -> fx.Node:
    """Gradients ``[..., columns]`` of looked-up rows, added up at ``indices`` into ``[rows, columns]``."""
    gradient, indices, rows, padding, by_frequency = node.args
    if cut.dim == 1:
        inner = cut.take(gradient, len(shape(gradient)) - 1)  # type: ignore[arg-type]
        return cut.emit(node.target, inner, indices, rows, padding, by_frequency, like=node)  # type: ignore[arg-type]
    moved = moved_indices(cut, indices, node)
    if isinstance(padding, int) and padding >= 0:
        is_padding = cut.emit(aten.eq.Scalar, indices, padding, like=node)
        moved = cut.emit(aten.where.self, is_padding, _extra_row(cut, moved, node), moved, like=node)
    # the extra row is a padding row: its gradient is not even added up
    result = cut.emit(node.target, gradient, moved, cut.length + 1, cut.length, by_frequency, like=node)  # type: ignore[arg-type]
    return without_last(cut, result, 0)


@rule(aten.index_put.default, aten._unsafe_index_put.default, contracts=True)
def index_put(cut: Cut, node: fx.Node) -> fx.Node:
    """``base[:, ..., indices] += values`` with one index tensor, for any dimension."""
    base, indices, values, *rest = node.args
    accumulate = bool(rest[0]) if rest else bool(node.kwargs.get("accumulate", False))
    if not accumulate:
        raise Refused("the operator replaces values instead of adding to them", node)
    place = only_place(node, indices)
    check_rank(node, place, values)
    where = len(indices) - 1  # type: ignore[arg-type]
    if cut.dim == where:
        moved = moved_indices(cut, place, node, shape(node)[where])
        grown = _with_extra_row(cut, cut.take(base, where), where, node)
        result = cut.emit(aten.index_put.default, grown, _at(where, moved), values, True, like=node)
        return without_last(cut, result, where)
    source = _dim_of_values(cut, where, place)
    if not same(shape(values)[source], shape(node)[cut.dim]):  # type: ignore[arg-type]
        raise Refused("the added values are broadcast along the cut dimension", node)
    parts = (cut.take(base, cut.dim), _at(where, place), cut.take(values, source))
    return cut.emit(aten.index_put.default, *parts, True, like=node)


@rule(aten._unsafe_masked_index_put_accumulate.default, contracts=True)
def masked_index_put(cut: Cut, node: fx.Node) -> fx.Node:
    """``base[:, ..., indices] += where(mask, values, 0)``: what falls outside the slice is masked as well."""
    assert callable(node.target)
    base, mask, indices, values = node.args
    place = only_place(node, indices)
    check_rank(node, place, values)
    where = len(indices) - 1  # type: ignore[arg-type]
    if cut.dim == where:
        moved = moved_indices(cut, place, node, shape(node)[where])
        inside = cut.emit(aten.lt.Scalar, moved, cut.length, like=node)
        for _ in range(len(shape(node)) - 1 - where):
            inside = cut.emit(aten.unsqueeze.default, inside, -1, like=node)
        both = cut.emit(aten.logical_and.default, mask, inside, like=node)
        return cut.emit(node.target, cut.take(base, where), both, _at(where, moved), values, like=node)
    source = _dim_of_values(cut, where, place)
    if not same(shape(values)[source], shape(node)[cut.dim]):  # type: ignore[arg-type]
        raise Refused("the added values are broadcast along the cut dimension", node)
    narrow_mask = sliced_if_wide(cut, mask, source, len(shape(values)))  # type: ignore[arg-type]
    parts = (cut.take(base, cut.dim), narrow_mask, _at(where, place), cut.take(values, source))
    return cut.emit(node.target, *parts, like=node)


@rule(aten.index_add.default, contracts=True)
def index_add(cut: Cut, node: fx.Node) -> fx.Node:
    """``base`` with ``values`` added at the places of one index vector along ``dim``."""
    base, dim, place, values = node.args
    assert isinstance(dim, int)
    dim %= len(shape(node))
    if dim != cut.dim:
        parts = (cut.take(base, cut.dim), dim, place, cut.take(values, cut.dim))
        return cut.emit(aten.index_add.default, *parts, like=node, **node.kwargs)
    moved = moved_indices(cut, place, node)
    grown = _with_extra_row(cut, cut.take(base, dim), dim, node)
    result = cut.emit(aten.index_add.default, grown, dim, moved, values, like=node, **node.kwargs)
    return without_last(cut, result, dim)


@rule(aten.index.Tensor, aten._unsafe_index.Tensor)
def index(cut: Cut, node: fx.Node) -> fx.Node:
    """``x[:, ..., indices]`` with one index tensor: sinks along every dimension but those that come from it."""
    assert callable(node.target)
    x: Any = node.args[0]
    indices: Any = node.args[1]
    where = max(d for d, i in enumerate(indices) if i is not None)
    place = only_place(node, indices[: where + 1])
    if where <= cut.dim < where + len(shape(place)):
        raise Refused("the cut dimension is one of the index tensor, which may name any indices", node)
    source = cut.dim if cut.dim < where else cut.dim - len(shape(place)) + 1
    return cut.emit(node.target, cut.take(x, source), _at(where, place), like=node)


def only_place(node: fx.Node, indices: Any) -> fx.Node:
    """The one integer tensor among the indices of ``node``, last behind whole dimensions; refuses any others."""
    *before, place = indices
    if any(i is not None for i in before):
        raise Refused("several dimensions are indexed at once", node)
    if place.meta["val"].dtype not in (torch.int64, torch.int32):
        raise Refused("the index is a mask", node)
    return place


def check_rank(node: fx.Node, place: fx.Node, values: Any) -> None:
    """Refuses values that ``node`` broadcasts because they have fewer dimensions than the places they are added to."""
    if len(shape(values)) != len(shape(node)) - 1 + len(shape(place)):
        raise Refused("the added values have fewer dimensions than their places", node)


def _at(where: int, place: fx.Node) -> list[fx.Node | None]:
    return [None] * where + [place]


def _dim_of_values(cut: Cut, where: int, place: fx.Node) -> int:
    """The dimension of the values that goes to the cut dimension, where that one is not indexed."""
    return cut.dim if cut.dim < where else cut.dim + len(shape(place)) - 1


def sliced_if_wide(cut: Cut, operand: fx.Node, dim: int, rank: int) -> fx.Node:
    """The slice of an operand that is broadcast to ``rank`` dimensions, unless it is broadcast along ``dim``."""
    own = dim - (rank - len(shape(operand)))
    return operand if own < 0 or same(shape(operand)[own], 1) else cut.take(operand, own)


@rule(aten.scatter_add.default, contracts=True)
def scatter_add(cut: Cut, node: fx.Node) -> fx.Node:
    """``base`` with each element of ``source`` added at its own index along ``dim``; the gradient of `gather`."""
    base, dim, indices, source = node.args
    assert isinstance(dim, int) and isinstance(indices, fx.Node) and isinstance(source, fx.Node)
    if dim == cut.dim:
        moved = moved_indices(cut, indices, node)
        grown = _with_extra_row(cut, cut.take(base, dim), dim, node)
        result = cut.emit(aten.scatter_add.default, grown, dim, moved, source, like=node)
        return without_last(cut, result, dim)
    if not all(same(shape(n)[cut.dim], shape(node)[cut.dim]) for n in (indices, source)):
        raise Refused("values are added to a part of the cut dimension only", node)
    parts = (cut.take(n, cut.dim) for n in (base, indices, source))
    new_base, new_indices, new_source = parts
    return cut.emit(aten.scatter_add.default, new_base, dim, new_indices, new_source, like=node)


def _with_extra_row(cut: Cut, base: fx.Node, dim: int, like: fx.Node) -> fx.Node:
    sizes = replaced(list(base.meta["val"].shape), dim, 1)
    value = base.meta["val"]
    row = cut.emit(aten.full.default, sizes, 0, dtype=value.dtype, device=value.device, like=like)
    return cut.emit(aten.cat.default, [base, row], dim, like=like)
