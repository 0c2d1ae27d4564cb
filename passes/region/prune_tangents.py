"""prune_tangents: drop what only absent gradients would feed.

Contract: a tangent that the caller will not provide (logits, when only the loss is used) counts as
zero. Backward is linear in its tangents, so a node all of whose tangent-dependent operands are zero is
zero itself; a sum loses its zero operand, a head the tangent of its entropies; any other operator gets a real zero of
the right shape, like another of its operands where there is one. Backward outputs that are zero become ``None``.

Terms: *zero* is a value known to be zero because every tangent under it is absent.

Before::

    add: "f32[8, 128]" = aten.add.Tensor(tangents_1, view)     # tangents_1 is absent

After::

    view
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

from chunkft_fx.graph.region import RegionGraph
from chunkft_fx.graph.rewrite import insert_before, same
from chunkft_fx.head import log_probs

aten = torch.ops.aten


@dataclass(frozen=True)
class PruneTangents:
    """Treat the tangents marked in ``absent`` (one entry a tangent, in order) as zero."""

    absent: tuple[bool, ...]
    name: str = "prune_tangents"
    numerics: Literal["bitwise", "reassociated"] = "bitwise"

    def __call__(self, region: RegionGraph) -> int:
        tangents = region.placeholders("tangent")
        zero = {node for node, absent in zip(tangents, self.absent, strict=True) if absent}
        if not zero:
            return 0
        dependent = set(tangents)
        rewrites = 0
        for node in list(region.graph.nodes):
            operands = [n for n in node.all_input_nodes if n in dependent]
            if node.op != "call_function" or not operands:
                continue
            dependent.add(node)
            zeros = [n for n in operands if n in zero]
            if len(zeros) == len(operands):
                zero.add(node)
            elif zeros:
                rewrites += 1
                _drop(node, zeros)
        outputs = region.outputs
        kept = tuple(None if n in zero else n for n in outputs)
        region.set_outputs(kept)
        return rewrites + sum(a is not b for a, b in zip(outputs, kept, strict=True))


def _drop(node: fx.Node, zeros: list[fx.Node]) -> None:
    rest = [n for n in node.all_input_nodes if n not in zeros]
    if node.target is aten.add.Tensor and not node.kwargs and len(rest) == 1 and _alike(rest[0], node):
        node.replace_all_uses_with(rest[0])
        return
    for operand in zeros:
        if node.target is log_probs.backward and node.args[1] is operand:
            node.update_arg(1, None)
            continue
        # the operand itself may be a tangent that nobody brings
        given = next((n for n in rest if _alike(n, operand)), operand)
        zero = insert_before(node, aten.zeros_like.default, (given,), like=node)
        node.replace_input_with(operand, zero)


def _alike(a: fx.Node, b: fx.Node) -> bool:
    x, y = a.meta["val"], b.meta["val"]
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return False
    return x.dtype == y.dtype and x.ndim == y.ndim and all(map(same, x.shape, y.shape))
