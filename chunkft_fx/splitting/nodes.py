"""Says what the proof asks of single nodes: where values come from, what they depend on, what messages call them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from chunkft_fx.capture.capture import Capture
from chunkft_fx.splitting.rules.layout import COPIES, RESHAPES
from chunkft_fx.torch_internals import is_random


def of_inputs(capture: Capture) -> frozenset[fx.Node]:
    """The nodes of the forward that no weight and no random draw goes into."""
    found: set[fx.Node] = set()
    for node in capture.graph.nodes:
        if node.op == "placeholder":
            is_own = node.name not in capture.parameters and node.name not in capture.tangents
        else:
            is_own = all(n in found for n in node.all_input_nodes) and not is_random(node)
        if is_own:
            found.add(node)
    return frozenset(found)


def is_tensor(leaf: Any) -> bool:
    """Whether an argument of a call is a node that gives a tensor."""
    return isinstance(leaf, fx.Node) and isinstance(leaf.meta["val"], Tensor)


def is_moved(node: fx.Node) -> bool:
    """Whether a node gives the values of another one, in the same order."""
    return node.target in COPIES or node.target in RESHAPES


def origin(node: fx.Node) -> fx.Node:
    """The node whose values a node gives, in the same order."""
    while is_moved(node):
        node = first(node)
    return node


def first(node: fx.Node) -> fx.Node:
    """The node that a node reads first."""
    first = node.args[0]
    assert isinstance(first, fx.Node)
    return first


def another(w: fx.Node, m: fx.Node) -> str:
    """Why nothing is known where both graphs call something else."""
    return f"is {named(m)} for a part of the batch"


def named(node: fx.Node) -> str:
    """What a node is called in messages."""
    return str(node.target) if node.op == "call_function" else node.name


def is_equal(a: Tensor, b: Any) -> bool:
    """Whether two constants of traces are equal."""
    return isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
