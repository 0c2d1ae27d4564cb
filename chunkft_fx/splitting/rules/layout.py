"""Decides where the batch's dimension lies after operators that move values without computing."""

from __future__ import annotations

from math import prod

import torch

from chunkft_fx.splitting.pair import Operand, Pair, Refused, Shape, aligned, along, differing, split_of
from chunkft_fx.splitting.relations import SAME, Relation, Several, Split, Summed
from chunkft_fx.splitting.rules.table import rule

aten = torch.ops.aten
prims = torch.ops.prims

# Operators that give their operand's values as they are; a trace of a part may have others of them than the whole's.
COPIES = (
    aten.clone.default, aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default, aten.contiguous.default,
    prims.view_of.default,
)  # fmt: skip
# Operators that give their operand's values in the same order, in another shape: all of them one as far as values go.
RESHAPES = (
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten._reshape_alias.default,
    aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.view_copy.default,
)  # fmt: skip
EXPANDS = (aten.expand.default, aten.expand_copy.default)


def reshaped(operand: Operand, whole: Shape, part: Shape, parts: int) -> Relation:
    """What values in another shape are to each other: the batch's dimension has to be as far out as before."""
    relation = operand.relation
    if not isinstance(relation, Split):
        if whole != part:
            raise Refused("takes a shape with the size of the batch where no value depends on it")
        return relation
    dim = differing(whole, part, parts)
    if prod(whole[:dim]) != prod(operand.whole[: relation.dim]):
        raise Refused("merges the samples of the batch with a dimension that lies outside of them")
    return Split(dim, relation.offset)


def expanded(operand: Operand, whole: Shape, part: Shape, parts: int) -> Relation:
    """What repeated values are to each other: along the batch they are as many as there are samples."""
    if isinstance(operand.relation, Summed):
        if whole != part:
            raise Refused("gives each sample a sum over all")
        return operand.relation
    rank = len(whole)
    if operand.relation == SAME:
        if whole == part:
            return SAME
        dim = differing(whole, part, parts)
        at = dim - (rank - len(operand.whole))
        if at >= 0 and operand.whole[at] != 1:
            raise Refused("takes as many values as the batch has samples from what does not depend on the batch")
        return Split(dim)
    assert isinstance(operand.relation, Split)
    dim = operand.relation.dim + rank - len(operand.whole)
    if differing(whole, part, parts) != dim:
        raise Refused("brings different samples of the batch together")
    return Split(dim, operand.relation.offset)


def _moved(relation: Relation, dim: int) -> Relation:
    assert isinstance(relation, Split)
    return Split(dim, relation.offset)


def _only(pair: Pair) -> tuple[Operand, Split]:
    """The operand of an operator with one, and how it is split."""
    (operand,) = pair.operands()
    if isinstance(operand.relation, Summed):
        raise Refused("rearranges a sum over the batch's samples")
    if not isinstance(operand.relation, Split):
        raise Refused("takes a range that depends on the size of the batch of what does not depend on it")
    return operand, operand.relation


@rule(aten.permute.default)
def permute(pair: Pair) -> Relation:
    operand, relation = _only(pair)
    order = [d % len(operand.whole) for d in pair.number("dims")]
    return _moved(relation, order.index(relation.dim))


@rule(aten.transpose.int, aten.t.default)
def transpose(pair: Pair) -> Relation:
    operand, relation = _only(pair)
    rank = len(operand.whole)
    a, b = (pair.number(name, default) % rank for name, default in (("dim0", 0), ("dim1", rank - 1)))
    return _moved(relation, {a: b, b: a}.get(relation.dim, relation.dim))


@rule(aten.slice.Tensor, differ=("end",))
def slice_(pair: Pair) -> Relation:
    """Along other dimensions, or all of the batch."""
    operand, relation = _only(pair)
    dim = pair.number("dim") % len(operand.whole)
    ends = pair.numbers("end")
    if dim == relation.dim:
        is_all = pair.number("start") in (None, 0) and pair.number("step") == 1
        sizes = operand.whole[dim], operand.part[dim]
        if not is_all or any(end is not None and end < size for end, size in zip(ends, sizes, strict=True)):
            raise Refused("takes some of the batch's samples")
    elif ends[0] != ends[1]:
        raise Refused("takes a range that depends on the size of the batch")
    return relation


@rule(aten.select.int)
def select(pair: Pair) -> Relation:
    operand, relation = _only(pair)
    dim = pair.number("dim") % len(operand.whole)
    if dim == relation.dim:
        raise Refused("takes one of the batch's samples")
    return _moved(relation, relation.dim - (dim < relation.dim))


@rule(aten.unbind.int)
def unbind(pair: Pair) -> Relation:
    taken = select(pair)
    return Several((taken,) * len(pair.whole))


@rule(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
def split(pair: Pair) -> Relation:
    operand, relation = _only(pair)
    if pair.number("dim") % len(operand.whole) == relation.dim:
        raise Refused("divides the batch's samples")
    return Several((relation,) * len(pair.whole))


@rule(aten.cat.default, aten.stack.default)
def cat(pair: Pair) -> Relation:
    """Joined along another dimension, where every operand is split along the same.

    Tensors of shape ``[0]`` add nothing, whatever the rank of the others.
    """
    operands = [o for o in pair.operands() if o.whole != (0,)]
    dims = {split_of(o) for o in operands}
    if len(dims) != 1:
        raise Refused("brings different samples of the batch together")
    (batch,) = dims
    is_stack = pair.node.target is aten.stack.default
    dim = pair.number("dim") % (len(operands[0].whole) + is_stack)
    if is_stack:
        return Split(batch + (dim <= batch))
    if dim == batch:
        raise Refused("joins samples along the batch's dimension, or along one it was merged with")
    return Split(batch)


@rule(aten.slice_scatter.default, aten.select_scatter.default)
def scattered(pair: Pair) -> Relation:
    """A range, or an index, of another dimension is replaced in each sample."""
    x = pair.given("self")
    batch, dim = split_of(x), pair.number("dim") % len(x.whole)
    if dim == batch:
        raise Refused("replaces some of the batch's samples")
    is_one = pair.node.target is aten.select_scatter.default
    aligned(pair.given("src"), batch - (is_one and dim < batch), len(x.whole) - is_one)
    return Split(batch)


@rule(aten.repeat.default, differ=("repeats",))
def repeat(pair: Pair) -> Relation:
    """What does not depend on the batch repeated for each sample, or samples repeated along other dimensions."""
    (operand,) = pair.operands()
    whole, part = pair.numbers("repeats")
    rank = len(whole)
    if operand.relation == SAME:
        dim = differing(pair.whole[0], pair.part[0], pair.parts)
        if whole[dim] != pair.parts * part[dim] or whole[:dim] + whole[dim + 1 :] != part[:dim] + part[dim + 1 :]:
            raise Refused("repeats values in a way that depends on the size of the batch")
        return Split(dim)
    _, relation = _only(pair)
    dim = relation.dim + rank - len(operand.whole)
    if whole != part or whole[dim] != 1:
        raise Refused("repeats the batch's samples")
    return _moved(relation, dim)


@rule(aten.tril.default, aten.triu.default)
def triangle(pair: Pair) -> Relation:
    (operand,) = pair.operands()
    dim = split_of(operand)
    if dim >= len(operand.whole) - 2:
        raise Refused("keeps another part of each of the batch's samples")
    return Split(dim)


@rule(aten.constant_pad_nd.default, aten.reflection_pad1d.default, aten.reflection_pad2d.default,
      aten.replication_pad1d.default, aten.replication_pad2d.default)  # fmt: skip
def pad(pair: Pair) -> Relation:
    """Pads are counted from the last dimension."""
    operand, relation = _only(pair)
    pads = pair.number("pad", pair.number("padding"))
    behind = len(operand.whole) - 1 - relation.dim
    if any(pads[2 * behind : 2 * behind + 2]):
        raise Refused("adds samples to the batch")
    return Split(split_of(operand))


@rule(aten.flip.default, aten.roll.default, prims.rev.default)
def reordered(pair: Pair) -> Relation:
    operand, relation = _only(pair)
    if relation.dim in along(pair.number("dims"), len(operand.whole)):
        raise Refused("brings the batch's samples into another order")
    return relation


@rule(aten.view_as_real.default, aten.view_as_complex.default, aten.real.default, aten.imag.default)
def complex_parts(pair: Pair) -> Relation:
    """Real and imaginary parts lie along a last dimension of their own, or are one of both."""
    operand, relation = _only(pair)
    if pair.node.target is aten.view_as_complex.default and relation.dim == len(operand.whole) - 1:
        raise Refused("makes one number of two of the batch's samples")
    return relation


@rule(aten.unfold.default, aten.diagonal.default)
def window(pair: Pair) -> Relation:
    """Dimensions that are looked into give way to one at the end."""
    operand, relation = _only(pair)
    rank = len(operand.whole)
    if pair.node.target is aten.unfold.default:
        if pair.number("dimension") % rank == relation.dim:
            raise Refused("looks at several of the batch's samples at once")
        return relation
    taken = {pair.number("dim1") % rank, pair.number("dim2") % rank}
    if relation.dim in taken:
        raise Refused("takes another part of each of the batch's samples")
    return _moved(relation, relation.dim - sum(d < relation.dim for d in taken))
