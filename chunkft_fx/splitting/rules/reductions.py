"""Decides what operators that look along dimensions do to a split batch: nothing, or a sum over samples.

A sum over the batch is the sum of those of the parts, and a mean the mean of theirs, since parts are equal. Every other
reduction over samples proves nothing.
"""

from __future__ import annotations

from fractions import Fraction

import torch

from chunkft_fx.splitting.pair import Pair, Refused, along, split_of
from chunkft_fx.splitting.relations import Relation, Several, Split, Summed, Unknown
from chunkft_fx.splitting.rules.table import rule

aten = torch.ops.aten

_SUMS = (aten.sum.default, aten.sum.dim_IntList, aten.count_nonzero.default, aten.count_nonzero.dim_IntList)
_MEANS = (aten.mean.default, aten.mean.dim)
_REDUCTIONS = (
    *_SUMS, *_MEANS, aten.amax.default, aten.amin.default, aten.aminmax.default, aten.max.default, aten.max.dim,
    aten.min.default, aten.min.dim, aten.prod.default, aten.prod.dim_int, aten.any.default, aten.any.dim,
    aten.any.dims, aten.all.default, aten.all.dim, aten.all.dims, aten.argmax.default, aten.argmin.default,
    aten.var.default, aten.var.dim, aten.var.correction, aten.var_mean.correction, aten.std.correction,
    aten.logsumexp.default, aten.linalg_vector_norm.default, aten.median.dim, aten.kthvalue.default, aten.mode.default,
)  # fmt: skip


@rule(*_REDUCTIONS)
def reduction(pair: Pair) -> Relation:
    (operand,) = pair.operands()
    target = pair.node.target
    if isinstance(operand.relation, Summed):
        if target not in (*_SUMS[:2], *_MEANS):
            raise Refused("computes with a sum over the batch's samples in a way that is not linear")
        return operand.relation
    dim, dims = split_of(operand), along(pair.number("dim"), len(operand.whole))
    if dim not in dims:
        kept = dim if pair.number("keepdim", False) else dim - sum(d < dim for d in dims)
        return Split(kept) if len(pair.whole) == 1 else Several((Split(kept),) * len(pair.whole))
    if target in _SUMS:
        return Summed(Fraction(1))
    if target in _MEANS:
        return Summed(Fraction(1, pair.parts))
    raise Refused("looks at all samples of the batch at once, or at a dimension that they were merged with")


@rule(
    aten._softmax.default, aten._log_softmax.default, aten._safe_softmax.default, aten.cumsum.default,
    aten.cumprod.default, aten.logcumsumexp.default, aten.cummax.default, aten.cummin.default, aten.sort.default,
    aten.sort.stable, aten.argsort.default, aten.argsort.stable, aten.topk.default, aten.glu.default,
    aten._fft_c2c.default, aten._fft_r2c.default, aten._fft_c2r.default,
)  # fmt: skip
def looking_along(pair: Pair) -> Relation:
    """What looks along some dimensions keeps the others apart."""
    (operand,) = pair.operands()
    dim = split_of(operand)
    if dim in along(pair.number("dim"), len(operand.whole)):
        raise Refused("looks at all samples of the batch at once, or at a dimension that they were merged with")
    return Split(dim) if len(pair.whole) == 1 else Several((Split(dim),) * len(pair.whole))


@rule(aten.native_layer_norm.default, aten._fused_rms_norm.default)
def layer_norm(pair: Pair) -> Relation:
    dim, operand = pair.split("input"), pair.given("input")
    pair.same("weight", "bias")
    if dim >= len(operand.whole) - len(pair.number("normalized_shape")):
        raise Refused("normalises over the samples of the batch")
    return Several((Split(dim),) * len(pair.whole))


@rule(aten.native_group_norm.default, differ=("N",))
def group_norm(pair: Pair) -> Relation:
    """Each of ``N`` samples by itself, which are the first dimension."""
    pair.same("weight", "bias")
    return Several((_first(pair, "input"),) * 3)


@rule(
    aten.native_batch_norm.default, aten._native_batch_norm_legit.default, aten._native_batch_norm_legit.no_stats,
    aten._native_batch_norm_legit_functional.default, aten._native_batch_norm_legit_no_training.default,
    aten._batch_norm_with_update.default, aten._batch_norm_with_update_functional.default,
    aten._batch_norm_no_update.default, aten.cudnn_batch_norm.default,
)  # fmt: skip
def batch_norm(pair: Pair) -> Relation:
    """By running statistics each sample is normalised by itself; only the result itself depends on it."""
    by_statistics = aten._native_batch_norm_legit_no_training.default, aten._batch_norm_no_update.default
    is_training = pair.node.target not in by_statistics and pair.number("training", True)
    if is_training:
        raise Refused("normalises over the samples of the batch")
    pair.same("weight", "bias", "running_mean", "running_var")
    split = _first(pair, "input")
    beside = Unknown("is made for the backward", pair.node)
    return Several((split,) + (beside,) * (len(pair.whole) - 1))


def _first(pair: Pair, name: str) -> Split:
    dim = pair.split(name)
    if dim != 0:
        raise Refused("takes the batch's samples for something else")
    return Split(0)
