"""Decides what losses are to those of the parts: sums, means over samples, and means over the labels that count.

A mean over the labels that count is the sum of the parts' sums, divided by the number of all of them. What a part needs
for that is written down in ``pair.label_means``, and put into its graph by `splitting.told`.
"""

from __future__ import annotations

from fractions import Fraction

import torch

from chunkft_fx.head import operators as head
from chunkft_fx.splitting.pair import Operand, Pair, Refused, aligned, split_of
from chunkft_fx.splitting.relations import SAME, Relation, Several, Split, Summed, Unknown
from chunkft_fx.splitting.rules.table import rule

aten = torch.ops.aten

# torch's numbers for what is done with the losses of the elements
_NONE, _MEAN, _SUM = 0, 1, 2
_MIXED = "compares samples of the batch with the labels of others"


@rule(
    aten.mse_loss.default, aten.smooth_l1_loss.default, aten.huber_loss.default, aten.binary_cross_entropy.default,
    aten.binary_cross_entropy_with_logits.default, aten.soft_margin_loss.default,
)  # fmt: skip
def elementwise_loss(pair: Pair) -> Relation:
    """One loss an element, then all of them, their sum, or the mean over all."""
    operands = pair.operands()
    dims = {split_of(o) + len(operands[0].whole) - len(o.whole) for o in operands if o.relation != SAME}
    if len(dims) != 1:
        raise Refused(_MIXED)
    (dim,) = dims
    for operand in operands:
        aligned(operand, dim, len(operands[0].whole))
    if operands[0].relation == SAME:
        raise Refused("compares each sample of the batch with what is the same for all")
    reduction = pair.number("reduction")
    if reduction == _NONE:
        return Split(dim)
    return Summed(Fraction(1) if reduction == _SUM else Fraction(1, pair.parts))


@rule(aten.nll_loss_forward.default, aten.nll_loss2d_forward.default)
def log_likelihood(pair: Pair) -> Relation:
    """The loss of the labels' classes, and the weight of all labels, of which the backward makes use."""
    _labelled(pair, "self", "target")
    pair.same("weight")
    total = Unknown("counts the labels of a batch", pair.node)
    reduction = pair.number("reduction")
    if reduction == _NONE:
        return Several((Split(0), total))
    if reduction == _SUM:
        return Several((Summed(Fraction(1)), total))
    pair.label_means.append(pair.node)
    return Several((Summed(Fraction(1)), SAME))


@rule(head.forward)
def head_loss(pair: Pair) -> Relation:
    """The loss of a head, which this library's own operator computes."""
    _labelled(pair, "hidden", "labels")
    pair.same("weight", "bias")
    if pair.number("mean"):
        pair.label_means.append(pair.node)
    return Summed(Fraction(1))


def _labelled(pair: Pair, scores: str, labels: str) -> None:
    operands: list[Operand] = [pair.given(scores), pair.given(labels)]
    if len(operands[1].whole) == 0 or any(split_of(o) != 0 for o in operands):
        raise Refused(_MIXED)
