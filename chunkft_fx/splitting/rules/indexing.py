"""Decides what look-ups do to a split batch: each sample's own, or those of what is the same for all samples."""

from __future__ import annotations

import torch

from chunkft_fx.splitting.pair import Operand, Pair, Refused, aligned, split_of
from chunkft_fx.splitting.relations import SAME, Relation, Split
from chunkft_fx.splitting.rules.table import rule

aten = torch.ops.aten

_MIXED = "looks up values of other samples of the batch"


@rule(aten.embedding.default)
def embedding(pair: Pair) -> Relation:
    pair.same("weight")
    if pair.number("scale_grad_by_freq"):
        raise Refused("scales gradients by how often the whole batch looks a row up")
    return Split(pair.split("indices"))


@rule(aten.index_select.default)
def index_select(pair: Pair) -> Relation:
    x, index = pair.given("self"), pair.given("index")
    dim = pair.number("dim") % len(x.whole)
    if x.relation == SAME:
        split_of(index)
        return Split(dim)
    if index.relation != SAME or split_of(x) == dim:
        raise Refused(_MIXED)
    return Split(split_of(x))


@rule(aten.gather.default)
def gather(pair: Pair) -> Relation:
    """Along the looked-up dimension any index is taken, along the others that of the result."""
    x, index = pair.given("self"), pair.given("index")
    dim = pair.number("dim") % len(x.whole)
    batch = split_of(index)
    if x.relation == SAME:
        if batch != dim:
            raise Refused(_MIXED)
    elif split_of(x) != batch or batch == dim or index.whole[batch] != x.whole[batch]:
        raise Refused(_MIXED)
    return Split(batch)


@rule(aten.scatter.src, aten.scatter.value, aten.scatter_add.default, aten.scatter_reduce.two)
def scatter(pair: Pair) -> Relation:
    """Each sample's own values into its own places."""
    x, index = pair.given("self"), pair.given("index")
    dim, batch = pair.number("dim") % len(x.whole), split_of(index)
    others = pair.operands("src")
    if batch == dim or any(split_of(o) != batch for o in (x, *others)):
        raise Refused(_MIXED)
    if any(o.whole[batch] != index.whole[batch] for o in (x, *others)):
        raise Refused(_MIXED)
    return Split(batch)


@rule(aten.index.Tensor, aten._unsafe_index.Tensor)
def index(pair: Pair) -> Relation:
    """By tensors of indices: of each sample by its own number, of all samples alike, or of what has no samples."""
    x = pair.given("self")
    given = pair.number("indices")
    pair.operands("indices")
    places = [i for i, o in enumerate(given) if isinstance(o, Operand)]
    tensors: list[Operand] = [given[i] for i in places]
    if any(t.relation != SAME and not isinstance(t.relation, Split) for t in tensors):
        raise Refused(_MIXED)
    is_adjacent = places == list(range(places[0], places[-1] + 1))
    first, rank = (places[0] if is_adjacent else 0), max(len(t.whole) for t in tensors)
    if all(t.relation == SAME for t in tensors):
        batch = split_of(x)
        if batch in places:
            raise Refused(_MIXED)
        before = sum(p < batch for p in places)
        # dimensions of the indices come in the place of the first, or before all others
        return Split(batch - before + (rank if first < batch or not is_adjacent else 0))
    dims = {t.relation.dim + rank - len(t.whole) for t in tensors if isinstance(t.relation, Split)}
    if len(dims) != 1:
        raise Refused(_MIXED)
    (dim,) = dims
    rows = [t for t in tensors if isinstance(t.relation, Split) and t.relation.offset]
    for t in tensors:
        if t not in rows:
            aligned(t, dim, rank)
    if x.relation == SAME:
        if rows:
            raise Refused("looks up values by the numbers of the batch's samples")
        return Split(first + dim)
    batch = split_of(x)
    by_row = given[batch] if batch < len(given) else None
    own = Split(dim - (rank - len(by_row.whole)), x.part[batch]) if isinstance(by_row, Operand) else None
    if rows != [by_row] or rows[0].relation != own:
        raise Refused(_MIXED)
    return Split(first + dim)
