"""Decides whether parts of a batch, run one by one, give what the whole batch does: a proof over both captured graphs.

The graph of the whole batch and that of a part are walked side by side, from the outputs to the inputs. Each operator
of the one has to be the same operator in the other, and a rule (`splitting.rules`) says what its results are to each
other, given what its operands are. Nothing else is taken for granted: a model that does something else for a batch of
another size, or that mixes samples, leaves outputs `Unknown`.

Gradients need no walk of their own. Where every operator's outputs are such functions of its operands for all values,
its derivatives are, too; so the proof asks that every derivative is torch's own, and that both traces made the same
calls (`Capture.path`), which cut off the same gradients.

A number that depends on the batch alone, as the count of labels that are not ignored, need not be split: it is computed
once for the whole batch and *told* to the parts (`splitting.told`).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from chunkft_fx.capture.blocks import module_path
from chunkft_fx.capture.capture import Capture, OutputName
from chunkft_fx.capture.user_code import where
from chunkft_fx.graph.sizes import Sizes
from chunkft_fx.head import operators as head
from chunkft_fx.splitting.nodes import another, first, is_equal, is_moved, is_tensor, named, of_inputs, origin
from chunkft_fx.splitting.pair import Operand, Pair, Refused, Shape
from chunkft_fx.splitting.relations import SAME, Relation, Same, Several, Split, Summed, Unknown
from chunkft_fx.splitting.rules import rule_for
from chunkft_fx.splitting.rules.layout import EXPANDS, expanded, reshaped
from chunkft_fx.torch_internals import is_random, is_torchs_own, named_arguments, tree_flatten
from chunkft_fx.torch_sizes import depends_on_data

Nodes = tuple[fx.Node, fx.Node]


class NotSeparable(Exception):
    """The parts are not proven to give what the whole does; the message says why, as half a sentence for users."""


@dataclass(frozen=True)
class Side:
    """One of the two graphs, with the values of its symbolic sizes."""

    capture: Capture
    sizes: Sizes


@dataclass(frozen=True)
class Proof:
    """What was proven: the relation of each output that is a tensor (None for others), in order.

    ``told`` pairs numbers of the whole's graph with those of the part's that they stand in for, ``label_means`` the
    losses that become a sum over labels, divided by the count of the whole batch's.
    """

    outputs: tuple[Relation | None, ...]
    told: tuple[Nodes, ...]
    label_means: tuple[Nodes, ...]


def prove(whole: Side, part: Side, parts: int, inputs: Sequence[Relation]) -> Proof:
    """The proof for ``parts`` equal parts, where the inputs that are tensors are to each other what ``inputs`` says.

    Raises `NotSeparable`.
    """
    _require_plain(whole.capture)
    if whole.capture.path != part.capture.path:
        raise NotSeparable("the model's forward takes another path for a part of it")
    walk = _Walk(whole, part, parts, inputs)
    outputs: list[Relation | None] = []
    for w, m in zip(whole.capture.outputs, part.capture.outputs, strict=True):
        if isinstance(w, OutputName) != isinstance(m, OutputName):
            raise NotSeparable("the model returns something else for a part of the batch")
        outputs.append(walk.output(w, m) if isinstance(w, OutputName) else None)
    walk.require_one_meaning()
    return Proof(tuple(outputs), tuple(walk.told), tuple(walk.label_means))


def _require_plain(capture: Capture) -> None:
    """`NotSeparable` for what no proof covers: values that are written, checks, derivatives of the user's own."""
    if capture.own_derivative:
        raise NotSeparable(f"the model has {capture.own_derivative}, whose gradients need not be those of its values")
    if capture.mutations:
        node = next(n for n in capture.graph.nodes if n.name == capture.mutations[0][1])
        place = where(node) or f" in {module_path(node)}"
        raise NotSeparable(f"the model writes a buffer or an input{place}, where each part would leave another value")
    if capture.effects:
        raise NotSeparable("the model checks its values, or has other side effects, which each part would have")


class _Walk:
    """Pairs of nodes with their relations, found from the outputs on, and what the whole's numbers are told of."""

    def __init__(self, whole: Side, part: Side, parts: int, inputs: Sequence[Relation]) -> None:
        self._sides, self._parts = (whole, part), parts
        self.told: list[Nodes] = []
        self.label_means: list[Nodes] = []
        self._found: dict[Nodes, Relation] = {}
        self._by_name = tuple({n.name: n for n in side.capture.graph.nodes} for side in self._sides)
        self._of_inputs = of_inputs(whole.capture) | of_inputs(part.capture)
        tensors = (
            [n for n in map(names.__getitem__, side.capture.primals) if is_tensor(n)]
            for side, names in zip(self._sides, self._by_name, strict=True)
        )
        self._found.update(zip(zip(*tensors, strict=True), inputs, strict=True))
        constants = zip(whole.capture.constants.items(), part.capture.constants.items(), strict=False)
        for (w, value), (m, other) in constants:
            if isinstance(value, Tensor) and is_equal(value, other):
                self._found[self._by_name[0][w], self._by_name[1][m]] = SAME

    def output(self, w: str, m: str) -> Relation | None:
        """The relation of an output; None for a number."""
        nodes = self._by_name[0][str(w)], self._by_name[1][str(m)]
        if not isinstance(nodes[0].meta["val"], Tensor):
            return None
        found = self._relation(*nodes)
        if isinstance(found, Split) and found.offset:
            found = Unknown("returns the numbers of the batch's samples", nodes[0])
        if isinstance(found, Unknown):
            raise NotSeparable(f"{named(found.node)}{where(found.node)} {found.reason}")
        return found

    def require_one_meaning(self) -> None:
        """`NotSeparable` where what is told a part would stand for several values of the whole."""
        told = {m: w for w, m in self.told}
        for w, m in self._found:
            if told.get(m, w) is not w:
                raise NotSeparable(f"a part of the batch computes {named(w)}{where(w)} together with {named(told[m])}")

    def _relation(self, w: fx.Node, m: fx.Node) -> Relation:
        waiting = [(w, m)]
        while waiting:
            nodes = waiting[-1]
            if nodes in self._found:
                waiting.pop()
                continue
            needed = self._needed(nodes)
            missing = [n for n in needed if n not in self._found] if isinstance(needed, list) else []
            if missing:
                waiting += missing
                continue
            found = self._concluded(nodes, needed) if isinstance(needed, list) else needed
            self._found[nodes] = self._or_told(nodes, found)
            waiting.pop()
        return self._found[w, m]

    def _needed(self, nodes: Nodes) -> list[Nodes] | Unknown:
        """The pairs that the relation of a pair follows from, or why there is none."""
        w, m = nodes
        if any(is_moved(n) for n in nodes):
            return [(origin(w), origin(m))]
        if w.target in EXPANDS:
            return [(first(w), first(m) if m.target in EXPANDS else m)]
        if m.target in EXPANDS:
            return [(w, first(m))]
        if w.op != "call_function" or w.target is not m.target:
            return Unknown(another(w, m), w)
        if w.target is operator.getitem:
            return [(first(w), first(m))] if w.args[1] == m.args[1] else Unknown(another(w, m), w)
        return self._operands(nodes)

    def _operands(self, nodes: Nodes) -> list[Nodes] | Unknown:
        """The tensors that an operator reads, in pairs."""
        found: list[Nodes] = []
        for (a, structure), (b, other) in self._flat(nodes).values():
            if structure != other:
                return Unknown(another(*nodes), nodes[0])
            for x, y in zip(a, b, strict=True):
                if is_tensor(x) != is_tensor(y):
                    return Unknown(another(*nodes), nodes[0])
                if is_tensor(x):
                    found.append((x, y))
        return found

    def _flat(self, nodes: Nodes) -> dict[str, tuple[tuple[list[Any], Any], tuple[list[Any], Any]]]:
        """By its name each argument of both calls as leaves and structure."""
        whole, part = (named_arguments(n) for n in nodes)
        return {name: (tree_flatten(value), tree_flatten(part.get(name))) for name, value in whole.items()}

    def _concluded(self, nodes: Nodes, needed: list[Nodes]) -> Relation:
        """What follows from the relations of what a pair needs."""
        relations = [self._found[n] for n in needed]
        unknown = next((r for r in relations if isinstance(r, Unknown)), None)
        if unknown is not None:
            return unknown
        try:
            return self._checked(nodes, needed, self._applied(nodes, needed, relations))
        except Refused as refused:
            return Unknown(refused.reason, nodes[0])

    def _applied(self, nodes: Nodes, needed: list[Nodes], relations: list[Relation]) -> Relation:
        w, m = nodes
        shapes = self._shapes(nodes)
        if any(is_moved(n) for n in nodes):
            operand = self._operand(*needed[0])
            return reshaped(operand, shapes[0][0], shapes[1][0], self._parts)
        if w.target in EXPANDS or m.target in EXPANDS:
            return expanded(self._operand(*needed[0]), shapes[0][0], shapes[1][0], self._parts)
        if w.target is operator.getitem:
            (several,) = relations
            if several == SAME:
                return SAME
            assert isinstance(several, Several) and isinstance(w.args[1], int)
            found = several.of[w.args[1]]
            if isinstance(found, Unknown):
                raise Refused(found.reason)
            return found
        if not is_torchs_own(w.target) and w.target is not head.forward and w not in self._of_inputs:
            raise Refused("is an operator that is not torch's own, whose gradients need not be those of its values")
        pair, differs = self._pair(nodes, shapes)
        is_alike = not differs and all(r == SAME for r in relations)
        if is_alike and not is_random(w):
            return SAME
        rule = rule_for(w.target)
        if rule is None:
            raise Refused("is an operator that no rule is known for")
        beyond = sorted(differs - rule.differ)
        if beyond:
            raise Refused(f"takes another {beyond[0]} for a part of the batch")
        found = rule.function(pair)
        unseen = [name for name in pair.arguments if name not in pair.seen and pair.operands(name)]
        assert not unseen, f"the rule of {w.target} looks at no {unseen}"
        if pair.label_means:
            # what is counted: all that the loss reads beside the scores, its first operand, and a head's weights
            counted = needed[-1:] if w.target is head.forward else needed[1:]
            if any(n not in self._of_inputs for pairs in counted for n in pairs):
                raise Refused("counts labels that depend on the weights")
            self.label_means.append(nodes)
        return found

    def _pair(self, nodes: Nodes, shapes: tuple[tuple[Shape, ...], tuple[Shape, ...]]) -> tuple[Pair, set[str]]:
        """A pair for its rule, and the names of the arguments whose numbers differ."""
        arguments: dict[str, tuple[Any, Any]] = {}
        differs: set[str] = set()
        for name, ((a, structure), (b, _)) in self._flat(nodes).items():
            leaves = [[], []]  # type: list[list[Any]]
            for x, y in zip(a, b, strict=True):
                values = [self._operand(x, y)] * 2 if is_tensor(x) else [self._number(x, 0), self._number(y, 1)]
                if values[0] != values[1] or type(values[0]) is not type(values[1]):
                    differs.add(name)
                for side, value in zip(leaves, values, strict=True):
                    side.append(value)
            arguments[name] = structure.unflatten(leaves[0]), structure.unflatten(leaves[1])
        return Pair(nodes[0], self._parts, arguments, *shapes), differs

    def _number(self, leaf: Any, side: int) -> Any:
        value = leaf.meta["val"] if isinstance(leaf, fx.Node) else leaf
        if isinstance(value, torch.SymInt):
            return self._size(value, side)
        if isinstance(value, (torch.SymFloat, torch.SymBool)):
            raise Refused("computes with a number that is a fraction of sizes")
        return value

    def _size(self, size: int | torch.SymInt, side: int) -> int:
        if depends_on_data(size):
            raise Refused("has a size that depends on data")
        return self._sides[side].sizes.of(size)

    def _operand(self, w: fx.Node, m: fx.Node) -> Operand:
        return Operand(self._found[w, m], *(self._shape(n.meta["val"], side) for side, n in enumerate((w, m))))

    def _shape(self, value: Tensor, side: int) -> Shape:
        return tuple(self._size(n, side) for n in value.shape)

    def _shapes(self, nodes: Nodes) -> tuple[tuple[Shape, ...], tuple[Shape, ...]]:
        """The shapes of a pair's results in both graphs."""
        values = [n.meta["val"] for n in nodes]
        several = [v if isinstance(v, (tuple, list)) else (v,) for v in values]
        if len(several[0]) != len(several[1]):
            raise Refused("has as many results as the batch has samples")
        whole, part = (
            tuple(self._shape(v, side) if isinstance(v, Tensor) else () for v in vs) for side, vs in enumerate(several)
        )
        return whole, part

    def _checked(self, nodes: Nodes, needed: list[Nodes], found: Relation) -> Relation:
        """A relation whose shapes and dtypes are those of the values."""
        if isinstance(found, (Several, Unknown)) or not isinstance(nodes[0].meta["val"], Tensor):
            return found
        if nodes[0].meta["val"].dtype != nodes[1].meta["val"].dtype:
            raise Refused("has another dtype for a part of the batch")
        (whole,), (part,) = self._shapes(nodes)
        expected = list(part)
        if isinstance(found, Split):
            expected[found.dim] *= self._parts
        if expected != list(whole):
            raise Refused(f"has a result of shape {list(whole)} for the batch and {list(part)} for a part")
        if isinstance(found, Summed):
            _require_sum(nodes[0], [w for w, m in needed if isinstance(self._found[w, m], Summed)])
        return found

    def _or_told(self, nodes: Nodes, found: Relation) -> Relation:
        """`Same` instead, where it is a number of the batch alone, which the whole can tell."""
        if isinstance(found, (Several, Same)) or any(n not in self._of_inputs for n in nodes):
            return found
        values = [n.meta["val"] for n in nodes]
        if not all(isinstance(v, Tensor) for v in values) or nodes[0].op != "call_function":
            return found
        try:
            shapes = [self._shape(v, side) for side, v in enumerate(values)]
        except Refused:
            return found
        if shapes[0] != shapes[1] or prod(shapes[0]) != 1 or values[0].dtype != values[1].dtype:
            return found
        self.told.append(nodes)
        return SAME


def _require_sum(node: fx.Node, sums: Sequence[fx.Node]) -> None:
    """`Refused` for sums in a dtype in which parts do not add up: integers that wrap, or the integers of fractions."""
    dtype = node.meta["val"].dtype
    if dtype.is_floating_point or dtype.is_complex:
        return
    if dtype != torch.int64:
        raise Refused(f"sums over the batch's samples in {dtype}, which does not hold every sum")
    if any(n.meta["val"].dtype != torch.int64 for n in sums):
        raise Refused("rounds a sum over the batch's samples")
