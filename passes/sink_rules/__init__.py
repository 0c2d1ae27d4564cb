"""Sinking rules, by family; importing this package fills the table."""

from __future__ import annotations

from typing import Any

import torch

from chunkft_fx.head import operators as chunked_head
from chunkft_fx.passes.sink_rules import contraction, head, indexing, layout, normalization
from chunkft_fx.passes.sink_rules.elementwise import elementwise_rule
from chunkft_fx.passes.sink_rules.table import RULES, Cut, Rule

aten = torch.ops.aten

# Rules of operators with several results, which are read through getitem. A convolution computes its
# gradients one by one, and the parts of a chunked head are merged again, so their rules pay off even when
# the input gradient is needed as well.
ITEM_RULES = {
    aten.convolution_backward.default: Rule(contraction.convolution_backward, contracts=True),
    aten.native_layer_norm_backward.default: Rule(normalization.layer_norm, contracts=True),
    aten._fused_rms_norm_backward.default: Rule(normalization.rms_norm, contracts=True),
    aten.native_group_norm_backward.default: Rule(normalization.group_norm, contracts=True),
    aten.native_batch_norm_backward.default: Rule(normalization.batch_norm, contracts=True),
    chunked_head.backward: Rule(head.linear_cross_entropy, contracts=True),
}
SPLITS = (aten.convolution_backward.default, chunked_head.backward)

__all__ = ["ITEM_RULES", "RULES", "SPLITS", "Cut", "Rule", "indexing", "layout", "rule_for"]


def rule_for(target: Any) -> Rule | None:
    """The rule of a single-result operator, or None."""
    return RULES.get(target) or elementwise_rule(target)
