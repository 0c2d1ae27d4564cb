"""Decides what products, convolutions and attention do to a split batch."""

from __future__ import annotations

from fractions import Fraction

import torch

from chunkft_fx.splitting.pair import Operand, Pair, Refused, aligned, split_of
from chunkft_fx.splitting.relations import SAME, Relation, Several, Split, Summed, Unknown
from chunkft_fx.splitting.rules.table import rule

aten = torch.ops.aten

_MIXED = "brings different samples of the batch together"


def _product(first: Operand, second: Operand) -> Relation:
    """Of two matrices, or of two batches of them."""
    rank = len(first.whole)
    rows, columns, inner = rank - 2, rank - 1, (rank - 1, rank - 2)
    if second.relation == SAME:
        dim = split_of(first)
        if dim != rows:
            raise Refused(_MIXED)
        return Split(rows)
    if first.relation == SAME:
        dim = split_of(second)
        if dim != columns:
            raise Refused(_MIXED)
        return Split(columns)
    dims = split_of(first), split_of(second)
    if dims == inner:
        return Summed(Fraction(1))
    if dims != (0, 0) or rank != 3:
        raise Refused(_MIXED)
    return Split(0)


@rule(aten.mm.default, aten.bmm.default)
def product(pair: Pair) -> Relation:
    return _product(*pair.operands())


@rule(aten.addmm.default, aten.baddbmm.default)
def product_and_sum(pair: Pair) -> Relation:
    names = ("mat1", "mat2") if pair.node.target is aten.addmm.default else ("batch1", "batch2")
    found = _product(pair.given(names[0]), pair.given(names[1]))
    if not isinstance(found, Split):
        raise Refused("adds to a sum over the batch's samples")
    pair.shared("self", found.dim, len(pair.whole[0]))
    return found


@rule(aten.mv.default, aten.dot.default)
def product_with_vector(pair: Pair) -> Relation:
    first, second = pair.operands()
    if second.relation == SAME and split_of(first) == 0 and len(first.whole) == 2:
        return Split(0)
    if (
        SAME not in (first.relation, second.relation)
        and split_of(second) == 0 == split_of(first) - len(first.whole) + 1
    ):
        return Summed(Fraction(1))
    raise Refused(_MIXED)


@rule(aten.convolution.default)
def convolution(pair: Pair) -> Relation:
    """Of samples along the first dimension; without one, all of the input is one sample."""
    pair.same("weight", "bias")
    if pair.split("input") != 0 or len(pair.given("input").whole) != len(pair.given("weight").whole):
        raise Refused(_MIXED)
    return Split(0)


@rule(
    aten.max_pool2d_with_indices.default, aten.max_pool3d_with_indices.default, aten.avg_pool1d.default,
    aten.avg_pool2d.default, aten.avg_pool3d.default, aten._adaptive_avg_pool2d.default,
    aten._adaptive_avg_pool3d.default, aten.adaptive_max_pool2d.default, aten.upsample_nearest1d.default,
    aten.upsample_nearest2d.default, aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec,
    aten.upsample_bilinear2d.default, aten.upsample_bilinear2d.vec, aten.upsample_bicubic2d.default,
    aten.upsample_bicubic2d.vec, aten.upsample_linear1d.default, aten.upsample_linear1d.vec,
    aten._upsample_bilinear2d_aa.default, aten._upsample_bicubic2d_aa.default, aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default, aten.channel_shuffle.default,
)  # fmt: skip
def image(pair: Pair) -> Relation:
    """Operators on images, of which those of a batch are the first of four dimensions; three where lines are images."""
    (operand,) = pair.operands()
    least = 3 if "1d" in str(pair.node.target) else 4
    if split_of(operand) != 0 or len(operand.whole) < least or len(operand.whole) != len(pair.whole[0]):
        raise Refused(_MIXED)
    return Split(0) if len(pair.whole) == 1 else Several((Split(0),) * len(pair.whole))


@rule(
    aten._scaled_dot_product_flash_attention.default, aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default, aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_fused_attention_overrideable.default,
)  # fmt: skip
def attention(pair: Pair) -> Relation:
    """Each sample by itself; what is made beside the first result is for the backward."""
    operands = pair.operands("query", "key", "value")
    if any(split_of(o) != 0 or len(o.whole) != 4 for o in operands):
        raise Refused(_MIXED)
    for mask in pair.operands("attn_mask", "attn_bias"):
        aligned(mask, 0, 4)
    beside = Unknown("is made for the backward", pair.node)
    return Several((Split(0),) + (beside,) * (len(pair.whole) - 1))
