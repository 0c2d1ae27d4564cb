"""Decides what operators that make values from sizes give to a split batch: constants, row numbers, random draws."""

from __future__ import annotations

import torch

from chunkft_fx.splitting.pair import Pair, Refused, differing, split_of
from chunkft_fx.splitting.relations import SAME, Relation, Several, Split
from chunkft_fx.splitting.rules.table import rule

aten = torch.ops.aten
prims = torch.ops.prims


@rule(
    aten.full.default, aten.zeros.default, aten.ones.default, aten.empty.memory_format, aten.new_full.default,
    aten.new_zeros.default, aten.new_ones.default, aten.new_empty.default, differ=("size",),
)  # fmt: skip
def constant(pair: Pair) -> Relation:
    """A tensor of one value; a tensor whose dtype it has says nothing of its values."""
    pair.operands("self")
    if pair.whole == pair.part:
        return SAME
    return Split(differing(pair.whole[0], pair.part[0], pair.parts))


@rule(aten.arange.default, aten.arange.start, aten.arange.start_step, prims.iota.default, differ=("end", "length"))
def numbers(pair: Pair) -> Relation:
    """Whole numbers from 0 on, as many as samples: each part counts its own from 0."""
    dtype = pair.node.meta["val"].dtype
    if pair.number("start", 0) != 0 or pair.number("step", 1) != 1 or dtype.is_floating_point:
        raise Refused("counts up to a number that depends on the size of the batch")
    differing(pair.whole[0], pair.part[0], pair.parts)
    return Split(0, pair.part[0][0])


@rule(
    aten.rand.default, aten.randn.default, aten.randint.default, aten.randint.low, aten.rand_like.default,
    aten.randn_like.default, aten.randint_like.default, aten.randint_like.low_dtype, aten.bernoulli.default,
    aten.bernoulli.p, aten.native_dropout.default, aten.uniform.default, aten.normal_functional.default,
    aten.exponential.default, differ=("size",),
)  # fmt: skip
def draws(pair: Pair) -> Relation:
    """Numbers that are drawn for each element by itself: other ones for a part, and as good."""
    if pair.whole == pair.part:
        raise Refused("draws random numbers that all samples of the batch share, which each part would draw anew")
    dim = differing(pair.whole[0], pair.part[0], pair.parts)
    if any(split_of(o) != dim for o in pair.operands() if o.relation != SAME):
        raise Refused("brings different samples of the batch together")
    return Split(dim) if len(pair.whole) == 1 else Several((Split(dim),) * len(pair.whole))
