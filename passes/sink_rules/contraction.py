"""Decides how slices move through operators that sum: matrix products, reductions, convolution backward.

A slice of a sum's result needs only a slice of its operands along a dimension that is not summed over.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from chunkft_fx.graph.rewrite import same, shape
from chunkft_fx.passes.sink_rules.table import Cut, Refused, rule

aten = torch.ops.aten


@rule(aten.mm.default, contracts=True)
def mm(cut: Cut, node: fx.Node) -> fx.Node:
    """``[rows, k] @ [k, columns]``: rows are cut from the first operand, columns from the second."""
    a, b = node.args
    a, b = (cut.take(a, 0), b) if cut.dim == 0 else (a, cut.take(b, 1))
    return cut.emit(aten.mm.default, a, b, like=node, **node.kwargs)


@rule(aten.bmm.default, contracts=True)
def bmm(cut: Cut, node: fx.Node) -> fx.Node:
    """``[batch, rows, k] @ [batch, k, columns]``: the batch is cut from both operands."""
    a, b = node.args
    if cut.dim in (0, 1):
        a = cut.take(a, cut.dim)
    if cut.dim in (0, 2):
        b = cut.take(b, cut.dim)
    return cut.emit(aten.bmm.default, a, b, like=node, **node.kwargs)


@rule(aten.addmm.default, contracts=True)
def addmm(cut: Cut, node: fx.Node) -> fx.Node:
    """As `mm`, plus a bias, which is cut where it is not broadcast along the cut dimension."""
    bias, a, b = node.args
    assert isinstance(bias, fx.Node)
    source = cut.dim - (2 - len(shape(bias)))
    if source >= 0 and same(shape(bias)[source], shape(node)[cut.dim]):
        bias = cut.take(bias, source)
    a, b = (cut.take(a, 0), b) if cut.dim == 0 else (a, cut.take(b, 1))
    return cut.emit(aten.addmm.default, bias, a, b, like=node, **node.kwargs)


@rule(aten.sum.dim_IntList, aten.mean.dim, contracts=True)
def reduce(cut: Cut, node: fx.Node) -> fx.Node:
    """A sum or mean over some dimensions: the operand is cut along one that is kept."""
    assert callable(node.target)
    x: Any = node.args[0]
    dims: Any = node.args[1] if len(node.args) > 1 else None
    if not dims:
        raise Refused("the operator sums over every dimension", node)
    keepdim = bool(node.args[2]) if len(node.args) > 2 else bool(node.kwargs.get("keepdim", False))
    rank = len(shape(x))
    summed = {d % rank for d in dims}
    if keepdim and cut.dim in summed:
        raise Refused("the cut dimension is one that the operator sums over", node)
    source = cut.dim if keepdim else [d for d in range(rank) if d not in summed][cut.dim]
    return cut.emit(node.target, cut.take(x, source), *node.args[1:], like=node, **node.kwargs)


@rule(aten.convolution_backward.default, contracts=True, is_separable=True)
def convolution_backward(cut: Cut, item: fx.Node) -> fx.Node:
    """Weight or bias gradient of a convolution, along output or input channels.

    ``item`` reads one result of ``aten.convolution_backward``: the gradient of the weight (1) or of the bias (2).
    The input gradient (0) stays with the old node, whose mask `eliminate` then clears.
    """
    node = item.all_input_nodes[0]
    gradient, x, weight, bias_sizes, stride, padding, dilation, transposed, output_padding, groups, _ = node.args
    if item.args[1] == 2:
        rank = len(shape(gradient))  # type: ignore[arg-type]
        over = [d for d in range(rank) if d != 1]
        return cut.emit(aten.sum.dim_IntList, cut.take(gradient, 1), over, like=item)
    if item.args[1] == 0:
        raise Refused("the cut value is the gradient of the convolution's input", node)
    if groups != 1:
        raise Refused("the convolution is grouped", node)
    if cut.dim > 1:
        raise Refused("the cut dimension runs over positions of the convolution's kernel", node)
    # a transposed convolution keeps its input channels first
    if (cut.dim == 0) != bool(transposed):
        gradient = cut.take(gradient, 1)
    else:
        x = cut.take(x, 1)
    weight = cut.take(weight, cut.dim)
    settings = (bias_sizes, stride, padding, dilation, transposed, output_padding, groups)
    result = cut.emit(
        aten.convolution_backward.default, gradient, x, weight, *settings, [False, True, False], like=node
    )
    return cut.emit(operator.getitem, result, 1, like=item)
