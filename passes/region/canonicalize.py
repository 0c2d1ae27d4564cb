"""canonicalize: one spelling for operators that come in several.

Contract: the meaning and every value stay, to the bit and to the stride. ``t`` and ``transpose`` become
``permute``; ``_unsafe_view`` becomes ``view``; ``alias`` and ``detach`` disappear (a joint graph has no
autograd state to hide); negative dimensions become positive.

Before::

    t: "f32[64, 32]" = aten.t(primals_1)
    detach: "f32[64, 32]" = aten.detach(t)

After::

    permute: "f32[64, 32]" = aten.permute(primals_1, [1, 0])
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from chunkft_fx.graph.region import RegionGraph
from chunkft_fx.graph.rewrite import insert_before, replace_node, shape

aten = torch.ops.aten

# Operators whose argument at this position is one dimension of the first operand, counted from the end if negative.
_DIM_ARGUMENT = {
    aten.slice.Tensor: 1,
    aten.select.int: 1,
    aten.squeeze.dim: 1,
    aten.scatter_add.default: 1,
}
_DIMS_ARGUMENT = {aten.permute.default: 1, aten.sum.dim_IntList: 1, aten.mean.dim: 1, aten.squeeze.dims: 1}


@dataclass(frozen=True)
class Canonicalize:
    """Rewrite equivalent spellings of an operator to the one that rules know."""

    name: str = "canonicalize"
    numerics: Literal["bitwise", "reassociated"] = "bitwise"

    def __call__(self, region: RegionGraph) -> int:
        return sum(_rewrite(node) for node in list(region.graph.nodes) if node.op == "call_function")


def _rewrite(node: fx.Node) -> int:
    target = node.target
    if target in (aten.alias.default, aten.detach.default):
        return _replaced(node, node.all_input_nodes[0])
    if target is aten._unsafe_view.default:
        node.target = aten.view.default
        return 1
    if target in (aten.t.default, aten.transpose.int):
        rank = len(shape(node))
        order = list(range(rank))
        pair: Any = node.args[1:] or (0, 1)
        if rank > 1:
            a, b = (d % rank for d in pair)
            order[a], order[b] = order[b], order[a]
        return _replaced(node, insert_before(node, aten.permute.default, (node.args[0], order)))
    if target in _DIM_ARGUMENT or target is aten.cat.default or target is aten.unsqueeze.default:
        return _positive(node)
    if target in _DIMS_ARGUMENT:
        return _positive_all(node, _DIMS_ARGUMENT[target])
    return 0


def _replaced(node: fx.Node, other: fx.Node) -> int:
    """Replace a node; returns the number of rewrites."""
    replace_node(node, other)
    return 1


def _positive(node: fx.Node) -> int:
    """Make the dimension argument non-negative; a missing one (its default is 0) is left out."""
    if len(node.args) < 2:
        return 0
    dim = node.args[1]
    # unsqueeze counts in its result, cat and the others in their operands; cat keeps the rank
    rank = len(shape(node)) if node.target in (aten.unsqueeze.default, aten.cat.default) else _operand_rank(node)
    if not isinstance(dim, int) or dim >= 0:
        return 0
    node.update_arg(1, dim + rank)
    return 1


def _positive_all(node: fx.Node, position: int) -> int:
    dims: Any = node.args[position] if len(node.args) > position else None
    if not dims or all(d >= 0 for d in dims):
        return 0
    rank = _operand_rank(node)
    node.update_arg(position, [d % rank for d in dims])
    return 1


def _operand_rank(node: fx.Node) -> int:
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    return len(shape(operand))
