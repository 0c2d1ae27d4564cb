"""Decides what elementwise operators do to a split batch: sample by sample with broadcasting, and sums where linear.

Every operator that torch tags as pointwise is elementwise in its tensor operands, so one rule serves them all;
`elementwise_rule` is asked for operators that are not in the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch

from chunkft_fx.splitting.pair import Operand, Pair, Refused, aligned, split_of
from chunkft_fx.splitting.relations import SAME, Relation, Split, Summed
from chunkft_fx.splitting.rules.table import Rule, rule
from chunkft_fx.torch_internals import is_operator, writes_memory

aten = torch.ops.aten
prims = torch.ops.prims

# Of two row numbers with the same offset these give what they give of any two numbers with that difference.
_COMPARISONS = (aten.eq.Tensor, aten.ne.Tensor, aten.lt.Tensor, aten.le.Tensor, aten.gt.Tensor, aten.ge.Tensor)


def elementwise(pair: Pair) -> Relation:
    """Split along the one dimension along which operands are; what is the same in all parts is broadcast along it."""
    operands = pair.operands()
    if len(pair.whole) != 1:
        raise Refused("has several results")
    if any(isinstance(o.relation, Summed) for o in operands):
        raise Refused("computes with a sum over the batch's samples in a way that is not linear")
    return Split(_dim(pair, operands))


def _dim(pair: Pair, operands: list[Operand]) -> int:
    """The dimension of the result along which it is split, where all operands are split or broadcast."""
    rank = len(pair.whole[0])
    dims = {o.relation.dim + rank - len(o.whole) for o in operands if isinstance(o.relation, Split)}
    if len(dims) != 1:
        raise Refused("brings different samples of the batch together")
    (dim,) = dims
    for operand in operands:
        aligned(operand, dim, rank)
    return dim


_ELEMENTWISE = Rule(elementwise, frozenset())


def elementwise_rule(target: Any) -> Rule | None:
    """The rule for an operator that torch tags as pointwise and that draws no random numbers."""
    if not is_operator(target):
        return None
    if torch.Tag.nondeterministic_seeded in target.tags or writes_memory(target):
        return None
    return _ELEMENTWISE if torch.Tag.pointwise in target.tags else None


@rule(
    aten.fill.Scalar, aten.empty_like.default, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default
)
def constant_like(pair: Pair) -> Relation:
    """A constant of the shape of another tensor."""
    (operand,) = pair.operands()
    if isinstance(operand.relation, Split):
        return Split(operand.relation.dim)
    return SAME


@rule(aten.masked_fill.Tensor, aten.fill.Tensor, aten.copy.default)
def filled(pair: Pair) -> Relation:
    """Elementwise, though torch does not say so in every version."""
    return elementwise(pair)


@rule(*_COMPARISONS)
def comparison(pair: Pair) -> Relation:
    """Two row numbers that each part counts from 0 compare as those of the whole batch do."""
    first, second = pair.operands("self", "other")
    offsets = {o.relation.offset if isinstance(o.relation, Split) else 0 for o in (first, second)}
    if offsets == {0}:
        return elementwise(pair)
    if len(offsets) != 1:
        raise Refused("compares the numbers of the batch's samples with other values")
    counted = [Operand(_counted(o), o.whole, o.part) for o in (first, second)]
    return Split(_dim(pair, counted))


@rule(aten.neg.default, aten._to_copy.default, prims.convert_element_type.default)
def linear(pair: Pair) -> Relation:
    """A change of sign or of dtype: of sums that of each summand, as the dtype holds them (`splitting.proof`)."""
    (operand,) = pair.operands()
    relation = operand.relation
    if isinstance(relation, Summed):
        return relation
    is_number = pair.node.target is not aten.neg.default and pair.node.meta["val"].dtype in (torch.int64, torch.int32)
    return relation if is_number else Split(split_of(operand))


@rule(aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar)
def sum_of_two(pair: Pair) -> Relation:
    """Sums over samples add up if they are of one kind; a mean over parts stays one with the same added to each."""
    operands = pair.operands()
    if any(isinstance(o.relation, Summed) for o in operands):
        return _sum_of_sums(pair, operands)
    return elementwise(pair)


def _sum_of_sums(pair: Pair, operands: list[Operand]) -> Relation:
    factors = {o.relation.factor for o in operands if isinstance(o.relation, Summed)}
    if any(isinstance(o.relation, Split) for o in operands):
        raise Refused("adds a sum over the batch's samples to each of them")
    mean = Fraction(1, pair.parts)
    if len(factors) > 1:
        raise Refused("adds a mean over the batch's samples to a sum that is divided otherwise")
    is_alone = all(isinstance(o.relation, Summed) for o in operands) and len(operands) == 2
    if not is_alone and factors != {mean}:
        raise Refused("adds what does not depend on the batch to a sum over its samples")
    return Summed(factors.pop())


@rule(aten.mul.Tensor, aten.mul.Scalar, differ=("other",))
def product(pair: Pair) -> Relation:
    """A multiple of a sum over samples, also one by a number that depends on the size of the batch."""
    return _scaled(pair, lambda whole, part: Fraction(whole) / Fraction(part))


@rule(aten.div.Tensor, aten.div.Scalar, aten.true_divide.Tensor, differ=("other",))
def quotient(pair: Pair) -> Relation:
    """A fraction of a sum over samples, also one by a number that depends on the size of the batch."""
    other = pair.operands("other") if "other" in pair.arguments else []
    if any(isinstance(o.relation, Summed) for o in other):
        raise Refused("divides by a sum over the batch's samples that depends on the weights")
    return _scaled(pair, lambda whole, part: Fraction(part) / Fraction(whole))


def _scaled(pair: Pair, ratio: Callable[[Any, Any], Fraction]) -> Relation:
    operands = pair.operands()
    numbers = pair.numbers("other")
    has_number = not isinstance(numbers[0], Operand)
    sums = [r for o in operands if isinstance(r := o.relation, Summed)]
    if has_number and numbers[0] != numbers[1]:
        if not sums or any(not isinstance(n, (int, float)) or n == 0 or not math.isfinite(n) for n in numbers):
            raise Refused("scales each sample by a number that depends on the size of the batch")
        return Summed(sums[0].factor * ratio(*numbers))
    if sums:
        if len(sums) > 1 or any(o.relation not in (SAME, sums[0]) for o in operands):
            raise Refused("multiplies a sum over the batch's samples by what depends on them")
        return sums[0]
    return elementwise(pair)


def _counted(operand: Operand) -> Relation:
    """The relation of row numbers as if they were values like others."""
    return Split(operand.relation.dim) if isinstance(operand.relation, Split) else operand.relation
