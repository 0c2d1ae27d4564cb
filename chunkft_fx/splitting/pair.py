"""Holds what a rule sees: one operator as both graphs call it, with what its operands are to each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from chunkft_fx.splitting.relations import SAME, Relation, Split, Summed

Shape = tuple[int, ...]


class Refused(Exception):
    """Raised where a rule proves nothing; ``reason`` says why, as half a sentence for users."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Operand:
    """A tensor that the operator reads, in both graphs: its relation, and its shapes as plain numbers."""

    relation: Relation
    whole: Shape
    part: Shape


@dataclass
class Pair:
    """An operator in both graphs; ``parts`` is their number.

    ``arguments`` has for each name of the operator's schema what the whole and what a part give: numbers as they are,
    tensors as `Operand`, alike on both sides. ``whole`` and ``part`` are the shapes of the results. Rules have to look
    at every operand (``seen``), and numbers that may differ are named where a rule is entered.
    """

    node: fx.Node
    parts: int
    arguments: dict[str, tuple[Any, Any]]
    whole: tuple[Shape, ...]
    part: tuple[Shape, ...]
    seen: set[str] = field(default_factory=set)
    # filled by rules of losses that are means over the labels that count
    label_means: list[fx.Node] = field(default_factory=list)

    def number(self, name: str, default: Any = None) -> Any:
        """What the whole gives for an argument that is no tensor; ``default`` if the operator has none of that name."""
        return self.arguments[name][0] if name in self.arguments else default

    def numbers(self, name: str) -> tuple[Any, Any]:
        """An argument that is no tensor, as the whole and as a part give it."""
        return self.arguments[name]

    def operand(self, name: str) -> Operand | None:
        """A tensor; None where none is given."""
        self.seen.add(name)
        found = self.arguments[name][0] if name in self.arguments else None
        return found if isinstance(found, Operand) else None

    def operands(self, *names: str) -> list[Operand]:
        """All tensors, in lists too; with ``names`` those of these arguments."""
        chosen = names or tuple(self.arguments)
        self.seen.update(chosen)
        found: list[Operand] = []
        for name in chosen:
            value = self.arguments.get(name, (None,))[0]
            leaves: Sequence[Any] = value if isinstance(value, (list, tuple)) else (value,)
            found += [leaf for leaf in leaves if isinstance(leaf, Operand)]
        return found

    def given(self, name: str) -> Operand:
        """A tensor that the operator always has."""
        found = self.operand(name)
        if found is None:
            raise Refused("is called without what it should read")
        return found

    def split(self, name: str) -> int:
        """The dimension along which a tensor is split; `Refused` if it is not."""
        return split_of(self.given(name))

    def same(self, *names: str) -> None:
        """`Refused` unless these tensors, as far as they are given, are the same in all parts."""
        for name in names:
            if any(o.relation != SAME for o in self.operands(name)):
                raise Refused("uses values of the batch's samples where it takes those of all")

    def shared(self, name: str, dim: int, rank: int) -> None:
        """`Refused` unless a tensor is split along ``dim`` of ``rank`` dimensions, or broadcast along it to all parts.

        A tensor of fewer dimensions is aligned with the last ones.
        """
        for operand in self.operands(name):
            aligned(operand, dim, rank)


def split_of(operand: Operand) -> int:
    """The dimension along which an operand is split; `Refused` for any other relation, and for row numbers."""
    if isinstance(operand.relation, Summed):
        raise Refused("computes with a sum over the batch's samples, which no part knows")
    if not isinstance(operand.relation, Split):
        raise Refused("is not computed sample by sample")
    if operand.relation.offset:
        raise Refused("computes with the numbers of the batch's samples")
    return operand.relation.dim


def aligned(operand: Operand, dim: int, rank: int) -> None:
    """`Refused` unless an operand is split along ``dim`` of ``rank`` dimensions, or has one index there for all."""
    at = dim - (rank - len(operand.whole))
    if operand.relation == SAME:
        if at >= 0 and operand.whole[at] != 1:
            raise Refused("takes as many values as the batch has samples from what does not depend on the batch")
    elif split_of(operand) != at:
        raise Refused("brings different samples of the batch together")


def along(dims: Any, rank: int) -> set[int]:
    """Dimensions counted from 0; None and no dimensions mean all."""
    if isinstance(dims, int):
        dims = [dims]
    return {d % max(rank, 1) for d in dims} if dims else set(range(rank))


def differing(whole: Shape, part: Shape, parts: int) -> int:
    """The one dimension in which a part's shape has its share of the whole's; `Refused` if it is not just one."""
    if len(whole) == len(part):
        dims = [d for d, (a, b) in enumerate(zip(whole, part, strict=True)) if a != b]
        if len(dims) == 1 and whole[dims[0]] == parts * part[dims[0]]:
            return dims[0]
    raise Refused(f"has a result of shape {list(whole)} for the batch and {list(part)} for each of {parts} parts")
