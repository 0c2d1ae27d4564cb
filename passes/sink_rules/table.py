"""Holds the table of sinking rules, and gives a rule what it works with: the cut, and the refusal.

A rule is a function ``rule(cut, value) -> replacement``. ``cut`` stands for ``narrow(value, dim, start, length)``; the
replacement must equal it, computed from slices of the operands of the operator that gave ``value``. A rule that cannot
do so raises `Refused`: the slice then stays behind the operator, which is always right, only slower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from chunkft_fx.graph.ops import narrow
from chunkft_fx.graph.rewrite import insert_before
from chunkft_fx.torch_internals import is_operator


class Refused(Exception):
    """Raised where a slice cannot move through ``node``; ``reason`` says why, as half a sentence for users."""

    def __init__(self, reason: str, node: fx.Node) -> None:
        super().__init__(reason)
        self.reason = reason
        self.node = node


@dataclass
class Cut:
    """One slice on its way down: along ``dim`` of a value, ``length`` indices from the run-time ``start``.

    New nodes go before ``anchor``. ``output`` is the index of the backward output that the slice is taken for;
    ``contracted`` says that the slice has passed an operator that sums, so that no dense gradient is left above it;
    ``taken`` lists the slices of operands, which are sunk next; ``made`` lists these and all other new nodes.
    """

    anchor: fx.Node
    dim: int
    start: fx.Node
    length: int
    output: int
    contracted: bool
    taken: list[fx.Node] = field(default_factory=list)
    made: list[fx.Node] = field(default_factory=list)

    def take(self, operand: Any, dim: int, start: fx.Node | None = None, length: int | None = None) -> fx.Node:
        """The slice of an operand along ``dim``, to be sunk further; by default of the cut's own indices.

        ``start`` is an ``i64[]`` node on the CPU, ``length`` a number of indices.
        """
        args = (operand, dim, start or self.start, length or self.length)
        node = insert_before(self.anchor, narrow, args, like=self.anchor)
        node.meta["output"] = self.output
        node.meta["contracted"] = self.contracted
        self.taken.append(node)
        self.made.append(node)
        return node

    def emit(self, target: Callable[..., Any], *args: Any, like: fx.Node, **kwargs: Any) -> fx.Node:
        """A new call of ``target``, whose module path and stack trace are those of ``like``."""
        node = insert_before(self.anchor, target, args, kwargs, like=like)
        node.meta["partitioner_tag"] = "is_backward"
        node.meta["rewritten"] = True
        self.made.append(node)
        return node

    def discard(self) -> None:
        """Erase every new node: what a rule has written before it refused must keep no value in use."""
        for node in reversed(self.made):
            node.graph.erase_node(node)


Function = Callable[[Cut, fx.Node], fx.Node]


@dataclass(frozen=True)
class Rule:
    """One entry of the table.

    ``contracts``: the operator sums over something, so that its operands are no dense gradient any more.
    ``is_separable``: the operator computes its several results one by one, so that a slice of one of them is worth
    taking even where another one, the input gradient, is needed whole.
    """

    function: Function
    contracts: bool
    is_separable: bool = False


RULES: dict[Any, Rule] = {}


def rule(*targets: Any, contracts: bool = False, is_separable: bool = False) -> Callable[[Function], Function]:
    """Register a function as the rule of operators, such as ``aten.mm.default``.

    For an operator with one result the function is called with its node. For an operator with several results it is
    called with the ``getitem`` node of the result that is cut: ``item.all_input_nodes[0]`` is the operator's node,
    ``item.args[1]`` the index of the result. Raises `TypeError` for what is no overload of an operator, which no node
    would ever call, and `ValueError` for an operator that has a rule already.
    """

    def register(function: Function) -> Function:
        for target in targets:
            if not is_operator(target):
                raise TypeError(f"{target} is no operator overload; name one, such as aten.mm.default")
            if target in RULES:
                raise ValueError(f"{target} has a rule already: {RULES[target].function.__name__}")
            RULES[target] = Rule(function, contracts, is_separable)
        return function

    return register


def replaced(sizes: Sequence[Any], dim: int, length: int) -> list[Any]:
    """Sizes with that of ``dim`` changed to ``length``."""
    return [length if i == dim else size for i, size in enumerate(sizes)]
