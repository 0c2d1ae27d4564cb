"""eliminate: remove what nothing asks for.

Contract: outputs stay, to the bit. Nodes that no output needs are erased, and multi-output backward
operators (convolution and normalisation backwards) are told through their output mask to skip the
results that nobody reads, so that an undemanded weight gradient is not computed beside an input gradient.

Before::

    convolution_backward = aten.convolution_backward(dy, x, w, [8], ..., [True, True, True])
    dx = getitem(convolution_backward, 0)
    dw = getitem(convolution_backward, 1)          # not an output any more

After::

    convolution_backward = aten.convolution_backward(dy, x, w, [8], ..., [True, False, False])
    dx = getitem(convolution_backward, 0)
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from chunkft_fx.graph.region import RegionGraph
from chunkft_fx.graph.rewrite import drop_dead, fake_value
from chunkft_fx.head import log_probs
from chunkft_fx.head import operators as head

aten = torch.ops.aten

# Position of the output mask in the arguments.
_MASKED: dict[Any, int] = {
    aten.convolution_backward.default: 10,
    aten.native_layer_norm_backward.default: 7,
    aten.native_group_norm_backward.default: 9,
    aten.native_batch_norm_backward.default: 9,
    aten._fused_rms_norm_backward.default: 5,
    head.backward: 8,
    log_probs.backward: 8,
}


@dataclass(frozen=True)
class Eliminate:
    """Erase dead nodes and mask out results that nobody reads."""

    name: str = "eliminate"
    numerics: Literal["bitwise", "reassociated"] = "bitwise"

    def __call__(self, region: RegionGraph) -> int:
        erased = drop_dead(region.graph)
        return erased + sum(_mask(node) for node in list(region.graph.nodes))


def _mask(node: fx.Node) -> int:
    position = _MASKED.get(node.target)
    if position is None or any(user.target is not operator.getitem for user in node.users):
        return 0
    read = {user.args[1] for user in node.users}
    before: Any = node.args[position]
    after = [bool(wanted) and i in read for i, wanted in enumerate(before)]
    if after == list(before):
        return 0
    node.update_arg(position, after)
    node.meta["val"] = fake_value(node)
    return 1
