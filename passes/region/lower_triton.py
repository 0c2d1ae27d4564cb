"""lower_triton: compute the gradient of a weight's slice by an operator that reads the slice where it is.

Contract: gradients of slices keep their meaning and get more precise: they are summed and returned in float32
(float64 in float64), where the matrix product rounds to its operands' dtype. Every other output stays to the bit.
Which problems are rewritten, and who computes them, is decided elsewhere (`chunkft_fx.machine.kernel_choice`) and given
as data; `problems` says what there is to decide.

Terms: a *product* is an ``aten.mm`` of a permuted and a plain operand of which one is cut by a run-time slice, as
`sink_slices` leaves them for a linear layer, cut along either dimension.

Refused, with the reason logged, and left to the library: sizes that are symbolic; a slice that is read by something
else too, for then its copy exists anyway; a cut operand that is not contiguous before a view of its slice; a gradient
that is not an output itself, but added to another or cast.

Before::

    narrow: "bf16[1024, 4]" = chunkft_fx.narrow(dy, 1, start_0, 4)
    permute: "bf16[4, 1024]" = aten.permute(narrow, [1, 0])
    mm: "bf16[4, 64]" = aten.mm(permute, x)

After::

    weight_gradient: "f32[4, 64]" = chunkft_fx.weight_gradient(dy, x, start_0, 0, 4, "128x256")
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from chunkft_fx.graph.ops import narrow
from chunkft_fx.graph.region import RegionGraph
from chunkft_fx.graph.rewrite import drop_dead, fake_value, insert_before, same, shape
from chunkft_fx.kernels.weight_gradient import Problem, weight_gradient

log = logging.getLogger("chunkft_fx.passes")

aten = torch.ops.aten

_VIEWS = (aten.view.default, aten.reshape.default)

# For each problem that the operator computes, who does it (`chunkft_fx.kernels.weight_gradient`); no entry: the graph
# stays as it is.
Choices = frozenset[tuple[Problem, str]]


@dataclass(frozen=True)
class LowerTriton:
    """Replace the products whose problem is in ``choices``."""

    choices: Choices = frozenset()
    name: str = "lower_triton"
    numerics: Literal["bitwise", "reassociated"] = "reassociated"
    # the verifier lets a gradient come in a wider dtype
    widens_gradients: bool = True

    def __call__(self, region: RegionGraph) -> int:
        chosen = dict(self.choices)
        found = [p for p in _products(region) if p.problem in chosen]
        for product in found:
            _lower(product, chosen[product.problem])
        if found:
            drop_dead(region.graph)
        return len(found)


def problems(region: RegionGraph) -> frozenset[Problem]:
    """The problems of all products that could be replaced."""
    return frozenset(p.problem for p in _products(region))


@dataclass(frozen=True)
class _Product:
    """A matrix product: its operands ``[tokens, out]`` and ``[tokens, in]``, and the slice that one of them is cut by.

    The cut one is given as it is before; ``readers`` are the permutations between the product and the output.
    """

    node: fx.Node
    operands: tuple[fx.Node, fx.Node]
    slice: fx.Node
    problem: Problem
    readers: tuple[fx.Node, ...]


def _products(region: RegionGraph) -> list[_Product]:
    found = []
    for node in region.graph.find_nodes(op="call_function", target=aten.mm.default):
        match = _match(region, node)
        if isinstance(match, str):
            log.debug("%s stays a product of the library: %s", node.name, match)
        elif match is not None:
            found.append(match)
    return found


def _match(region: RegionGraph, node: fx.Node) -> _Product | str | None:
    """The product that a node is, None if it is the gradient of no slice, or why it is refused."""
    first, second = node.args[:2]
    assert isinstance(first, fx.Node) and isinstance(second, fx.Node)
    if first.target is not aten.permute.default or first.args[1] != [1, 0]:
        return None
    sides = (first.all_input_nodes[0], second)
    cuts = [(dim, cut) for dim, side in enumerate(sides) if (cut := _cut(side)) is not None]
    if len(cuts) != 1:
        return None
    ((dim, cut),) = cuts
    whole = cut.all_input_nodes[0]
    if not all(isinstance(s, int) for n in (*sides, whole) for s in shape(n)):
        return "its sizes are symbolic"
    chain = [first, sides[0]] if dim == 0 else [second]
    while chain[-1] is not cut:
        chain.append(chain[-1].all_input_nodes[0])
    if any(len(n.users) > 1 for n in chain):
        return "its slice is read by something else too"
    if cut is not sides[dim] and not whole.meta["val"].is_contiguous():
        return "a view of what is cut would copy it"
    readers = _readers(region, node)
    if readers is None:
        return "its value is not an output itself"
    (tokens, rows), columns = shape(sides[0]), shape(second)[1]
    problem = Problem(int(tokens), int(rows), int(columns), dim, node.meta["val"].dtype)
    return _Product(node, (whole, second) if dim == 0 else (sides[0], whole), cut, problem, tuple(readers))


def _cut(operand: fx.Node) -> fx.Node | None:
    """The slice along the last dimension that an operand is, seen through views that keep this dimension."""
    node = operand
    while node.target in _VIEWS and _keeps_last(node):
        node = node.all_input_nodes[0]
    if node.target is not narrow or node.args[1] != len(shape(node)) - 1:
        return None
    return node


def _keeps_last(view: fx.Node) -> bool:
    before, after = shape(view.all_input_nodes[0]), shape(view)
    return bool(before and after) and same(before[-1], after[-1])


def _readers(region: RegionGraph, node: fx.Node) -> list[fx.Node] | None:
    """The permutations that lead from a node to one backward output; None if it is read otherwise."""
    readers: list[fx.Node] = []
    while True:
        if len(node.users) != 1:
            return None
        (user,) = node.users
        if user.op == "output":
            return readers if region.outputs.count(node) == 1 and node in region.backward_outputs else None
        if user.target is not aten.permute.default:
            return None
        readers.append(user)
        node = user


def _lower(product: _Product, by: str) -> None:
    _, _, start, length = product.slice.args
    dim, tokens = product.problem.dim, product.problem.tokens
    operands = list(product.operands)
    whole = operands[dim]
    if len(shape(whole)) != 2:
        flat = [tokens, shape(whole)[-1]]
        operands[dim] = insert_before(product.node, aten.view.default, (whole, flat))
    new = insert_before(product.node, weight_gradient, (*operands, start, dim, length, by))
    product.node.replace_all_uses_with(new)
    for reader in product.readers:
        reader.meta["val"] = fake_value(reader)
