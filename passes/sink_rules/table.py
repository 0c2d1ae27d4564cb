"""The table of sinking rules, and the cut that a rule is given.

A rule is a function ``rule(cut, node) -> replacement | None``. ``cut`` stands for
``narrow(node, dim, start, length)``; the replacement must equal it, computed from slices of the node's
operands. ``None`` refuses: the slice then stays behind the node, which is always right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from chunkft_fx.graph.ops import narrow
from chunkft_fx.graph.rewrite import insert_before


@dataclass
class Cut:
    """One slice on its way down: along ``dim`` of a value, ``length`` indices from the run-time ``start``.

    New nodes go before ``anchor``. ``output`` is the backward output it came from; ``contracted`` says
    that it has passed an operator that sums, so that no dense gradient is left above it; ``taken`` lists
    the slices of operands, which are sunk next.
    """

    anchor: fx.Node
    dim: int
    start: fx.Node
    length: int
    output: int
    contracted: bool
    taken: list[fx.Node] = field(default_factory=list)

    def take(self, operand: Any, dim: int, start: fx.Node | None = None, length: int | None = None) -> fx.Node:
        """The slice of an operand along ``dim``, to be sunk further; by default of the same indices."""
        args = (operand, dim, start or self.start, length or self.length)
        node = insert_before(self.anchor, narrow, args, like=self.anchor)
        node.meta["output"] = self.output
        node.meta["contracted"] = self.contracted
        self.taken.append(node)
        return node

    def emit(self, target: Callable[..., Any], *args: Any, like: fx.Node, **kwargs: Any) -> fx.Node:
        """A new operator whose provenance is ``like``'s."""
        node = insert_before(self.anchor, target, args, kwargs, like=like)
        node.meta["partitioner_tag"] = "is_backward"
        node.meta["rewritten"] = True
        return node


Function = Callable[[Cut, fx.Node], fx.Node | None]


@dataclass(frozen=True)
class Rule:
    """``contracts``: the operator sums over something, so its operands are no dense gradient any more."""

    function: Function
    contracts: bool


RULES: dict[Any, Rule] = {}


def rule(*targets: Any, contracts: bool = False) -> Callable[[Function], Function]:
    """Register a function as the rule of operators."""

    def register(function: Function) -> Function:
        for target in targets:
            RULES[target] = Rule(function, contracts)
        return function

    return register


def replaced(sizes: Sequence[Any], dim: int, length: int) -> list[Any]:
    """Sizes with one of them changed."""
    return [length if i == dim else size for i, size in enumerate(sizes)]
