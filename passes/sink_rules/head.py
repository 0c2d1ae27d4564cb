"""Decides how slices move through the chunked head: of its weight gradient only demanded rows or columns are computed.

``item`` reads one result of ``chunkft_fx::linear_cross_entropy_backward``, or of ``token_log_probs_backward``, which
has as many arguments before its mask. The slice becomes an operator of its own, which computes the logits again;
`passes.chunk_logits` merges it with the others of the same head where the loss is a number.
"""

from __future__ import annotations

import operator

from torch import fx

from chunkft_fx.head import log_probs
from chunkft_fx.head import operators as head
from chunkft_fx.passes.sink_rules.table import Cut, Refused, rule

# Arguments of the operator before its output mask.
_BEFORE_MASK = 8


@rule(head.backward, log_probs.backward, contracts=True, is_separable=True)
def chunked_head(cut: Cut, item: fx.Node) -> fx.Node:
    """Gradient of the head's weight (rows or columns) or bias."""
    node = item.all_input_nodes[0]
    assert callable(node.target)
    if len(node.args) > _BEFORE_MASK + 1:
        raise Refused("the head's gradient is a slice already", node)
    which = item.args[1]
    if which == 1:
        window = (cut.start, cut.dim, cut.length)
    elif which == 2:
        window = (None, 0, 0, cut.start, cut.length)  # type: ignore[assignment]
    else:
        raise Refused("the cut value is the gradient of the head's input", node)
    mask = [which == i for i in range(3)]
    result = cut.emit(node.target, *node.args[:_BEFORE_MASK], mask, *window, like=node)
    return cut.emit(operator.getitem, result, which, like=item)
