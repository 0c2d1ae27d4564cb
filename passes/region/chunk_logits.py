"""chunk_logits: compute the gradients of a head in the forward, from the logits that its loss needs anyway.

Contract: results stay equal up to rounding. The loss of a head and its gradients, which autograd records as
operators of forward and backward, become one operator of the forward, which computes the gradients for a tangent
of 1. They are saved, and the backward multiplies them by the true tangent in the dtype of the loss: logits are
computed once and never saved. The start of a weight's slice becomes an input of the forward.

Terms: a *head* is one ``linear_cross_entropy`` with the ``linear_cross_entropy_backward`` that have its operands.

Refused, with the reason logged, and left in two parts: float16, where the gradient of an unscaled loss can
underflow; and starts that are computed rather than given.

Before::

    loss: "f32[]" = chunkft_fx.linear_cross_entropy(x, w, None, labels, -100, 0.0, True)
    d_x = chunkft_fx.linear_cross_entropy_backward(tangents_1, x, w, ..., [True, False, False])[0]
    d_w = chunkft_fx.linear_cross_entropy_backward(tangents_1, x, w, ..., [False, True, False], start_0, 0, 64)[1]

After::

    both = chunkft_fx.linear_cross_entropy_grad(x, w, ..., [True, True, False], start_0, 0, 64)
    loss = both[0]
    d_x = aten.mul(both[1], tangents_1);  d_w = aten.mul(both[2], tangents_1)       # in the backward
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from chunkft_fx.graph.region import RegionGraph
from chunkft_fx.graph.rewrite import insert_before, replace_node
from chunkft_fx.head import operators as head

log = logging.getLogger("chunkft_fx.passes")

aten = torch.ops.aten
prims = torch.ops.prims

# Arguments of a head; in the backward operator they follow the tangent, and before the mask.
_OPERANDS = 7
# What follows the mask if nothing is sliced: start, dim and length of the weight, start and length of the bias.
_WHOLE = (None, 0, 0, None, 0)


@dataclass(frozen=True)
class ChunkLogits:
    """Merge each head's forward and backward operators."""

    name: str = "chunk_logits"
    numerics: Literal["bitwise", "reassociated"] = "reassociated"

    def __call__(self, region: RegionGraph) -> int:
        heads = region.graph.find_nodes(op="call_function", target=head.forward)
        return sum(self._merge(region, loss) for loss in heads)

    def _merge(self, region: RegionGraph, loss: fx.Node) -> int:
        parts = [
            n
            for n in region.graph.find_nodes(op="call_function", target=head.backward)
            if n.args[1 : 1 + _OPERANDS] == loss.args
        ]
        if not parts:
            return 0
        wanted = _combined(loss, parts)
        if isinstance(wanted, str):
            log.debug("%s and its gradient stay apart: %s", loss.name, wanted)
            return 0
        both = _forward(loss, head.grad, *loss.args, *wanted)
        replace_node(loss, _forward(loss, operator.getitem, both, 0))
        for part in parts:
            for item in list(part.users):
                which: Any = item.args[1]
                saved = _forward(both.next, operator.getitem, both, 1 + which, like=both)
                replace_node(item, _scaled(item, saved, part.args[0]))
            region.graph.erase_node(part)
        return len(parts)


def _combined(loss: fx.Node, parts: list[fx.Node]) -> tuple[Any, ...] | str:
    """Mask and slices that serve all parts at once, or why none do."""
    if loss.meta["val"].dtype != torch.float64 and _dtype(loss.args[0]) == torch.float16:
        return "a float16 gradient may underflow before it is multiplied by the tangent"
    windows = [(*part.args[2 + _OPERANDS :], *_WHOLE[len(part.args) - 2 - _OPERANDS :]) for part in parts]
    masks = [_read(part) for part in parts]
    mask = [any(m[i] for m in masks) for i in range(3)]
    weights = list(dict.fromkeys(w[:3] for w, m in zip(windows, masks, strict=True) if m[1]))
    biases = list(dict.fromkeys(w[3:] for w, m in zip(windows, masks, strict=True) if m[2]))
    if len(weights) > 1 or len(biases) > 1:
        return "two different slices of one weight are demanded"
    window = (*(weights[0] if weights else _WHOLE[:3]), *(biases[0] if biases else _WHOLE[3:]))
    if any(isinstance(s, fx.Node) and s.op != "placeholder" for s in window):
        return "the start of a slice is computed"
    return mask, *window


def _read(part: fx.Node) -> list[bool]:
    """Which results of a backward operator are read."""
    read = {user.args[1] for user in part.users}
    return [i in read for i in range(3)]


def _forward(anchor: fx.Node, target: Callable[..., Any], *args: Any, like: fx.Node | None = None) -> fx.Node:
    """A new operator of the forward before ``anchor``; what it gives is never computed twice."""
    node = insert_before(anchor, target, args, like=like)
    node.meta["save"] = True
    return node


def _scaled(item: fx.Node, saved: fx.Node, tangent: Any) -> fx.Node:
    """A saved gradient times the tangent, in the dtype of the tangent if that is the wider one."""
    dtype, wide = _dtype(item), _dtype(tangent)
    if dtype == wide:
        return insert_before(item, aten.mul.Tensor, (saved, tangent))
    widened = insert_before(item, prims.convert_element_type.default, (saved, wide))
    product = insert_before(item, aten.mul.Tensor, (widened, tangent))
    return insert_before(item, prims.convert_element_type.default, (product, dtype))


def _dtype(node: Any) -> torch.dtype:
    return node.meta["val"].dtype
