"""Decides how slices move through elementwise operators, with broadcasting, and through constants.

Every operator that torch tags as pointwise is elementwise in its tensor operands, so one rule serves them
all; `elementwise_rule` is asked for operators that are not in the table.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from chunkft_fx.graph.rewrite import same, shape
from chunkft_fx.passes.sink_rules.table import Cut, Rule, replaced, rule
from chunkft_fx.torch_internals import is_operator, writes_memory

aten = torch.ops.aten

# Elementwise, but without torch's tag in some supported version.
_UNTAGGED = (
    aten.elu_backward.default,
    aten.fill.Scalar,
    aten.fill.Tensor,
    aten.gelu_backward.default,
    aten.hardsigmoid_backward.default,
    aten.hardswish_backward.default,
    aten.hardtanh_backward.default,
    aten.leaky_relu_backward.default,
    aten.mish_backward.default,
    aten.native_dropout_backward.default,
    aten.softplus_backward.default,
    aten.threshold_backward.default,
)


def elementwise(cut: Cut, node: fx.Node) -> fx.Node:
    """Slice every operand that has the cut dimension; operands that are broadcast along it stay whole."""
    assert callable(node.target)
    rank = len(shape(node))

    def part(argument: Any) -> Any:
        if not isinstance(argument, fx.Node) or not isinstance(argument.meta["val"], Tensor):
            return argument
        dim = cut.dim - (rank - len(shape(argument)))
        if dim < 0 or not same(shape(argument)[dim], shape(node)[cut.dim]):
            return argument
        return cut.take(argument, dim)

    args = [part(a) for a in node.args]
    kwargs = {k: part(v) for k, v in node.kwargs.items()}
    return cut.emit(node.target, *args, like=node, **kwargs)


_ELEMENTWISE = Rule(elementwise, contracts=False)


def elementwise_rule(target: Any) -> Rule | None:
    """The rule for an operator that torch tags as pointwise and that draws no random numbers."""
    if not is_operator(target):
        return None
    if torch.Tag.nondeterministic_seeded in target.tags or writes_memory(target):
        return None
    return _ELEMENTWISE if torch.Tag.pointwise in target.tags or target in _UNTAGGED else None


@rule(aten.full.default, aten.zeros.default, aten.ones.default)
def constant(cut: Cut, node: fx.Node) -> fx.Node:
    """A tensor of one value, made from sizes: made smaller."""
    sizes: Any = node.args[0]
    assert callable(node.target)
    return cut.emit(node.target, replaced(sizes, cut.dim, cut.length), *node.args[1:], like=node, **node.kwargs)


@rule(aten.new_zeros.default, aten.new_ones.default, aten.new_full.default)
def new_constant(cut: Cut, node: fx.Node) -> fx.Node:
    """A tensor of one value with the dtype and device of another one, made from sizes: made smaller."""
    like, sizes, *rest = node.args
    assert callable(node.target)
    return cut.emit(node.target, like, replaced(sizes, cut.dim, cut.length), *rest, like=node, **node.kwargs)  # type: ignore[arg-type]


@rule(aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.empty_like.default)
def constant_like(cut: Cut, node: fx.Node) -> fx.Node:
    """A tensor of one value with the shape of another one: made of the slice of that."""
    assert callable(node.target)
    x, *rest = node.args
    return cut.emit(node.target, cut.take(x, cut.dim), *rest, like=node, **node.kwargs)
