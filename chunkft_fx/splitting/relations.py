"""Holds what a value of a whole batch's graph can be to the values of its parts.

The whole batch's graph and a part's graph are walked side by side. ``w`` is a value of the one, ``m[i]`` what the other
computes in its place for part ``i`` of ``n``, counted from 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from torch import fx


@dataclass(frozen=True)
class Same:
    """``w == m[i]`` for every part: what does not depend on the batch, or is told to all parts."""


@dataclass(frozen=True)
class Split:
    """``w.chunk(n, dim)[i] == m[i] + i * offset``: a part's values are its share of the whole's, along a dimension.

    The batch lies along that dimension, alone or as the outermost of several that were merged. An offset other than 0
    is that of row numbers, which each part counts from 0: then all ``m[i]`` are at least 0 and below the offset.
    """

    dim: int
    offset: int = 0


@dataclass(frozen=True)
class Summed:
    """``w == factor * (m[0] + m[1] + ...)``: a sum over samples, or with a factor of ``1 / n`` their mean."""

    factor: Fraction


@dataclass(frozen=True)
class Several:
    """What an operator with several results gives: the relation of each."""

    of: tuple[Relation, ...]


@dataclass(frozen=True)
class Unknown:
    """Nothing is proven, because of what ``node`` of the whole batch's graph does."""

    reason: str
    node: fx.Node


Relation = Same | Split | Summed | Several | Unknown
SAME = Same()
