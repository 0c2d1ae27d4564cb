"""Writes side effects of a forward into its graph as values, so that they happen though no other value needs them.

An effect is, for example, the check that a matrix could be inverted. A trace threads effects
through *tokens*, tensors without elements: an operator with an effect takes a token and gives a new one, and the last
token is an output of the graph. Regions pass tokens on like any other value, so that effects keep their order and none
is dropped. Assertions, which a trace leaves without a token, get one here.
"""

from __future__ import annotations

import operator
import re
from typing import Any

import torch
from torch import Tensor, fx

from chunkft_fx.graph.rewrite import insert_before
from chunkft_fx.graph.sub_graphs import copied_graph
from chunkft_fx.torch_internals import fake_mode_of

aten = torch.ops.aten
with_effects: Any = torch.ops.higher_order.with_effects

_ASSERTIONS = (aten._assert_async.default, aten._assert_async.msg, aten._assert_scalar.default)
TOKEN = "token"


def new_token() -> Tensor:
    """The value of a token that no effect has gone through yet."""
    return torch.empty(0)


def with_tokens(graph: fx.Graph) -> tuple[str, ...]:
    """Give each assertion of a joint graph's forward a token of its own; returns the names of the new tokens.

    All start from one placeholder named `TOKEN`, which is added in front if there is any.
    """
    found = [n for n in graph.nodes if n.target in _ASSERTIONS]
    if not found:
        return ()
    first = next(iter(graph.nodes))
    with graph.inserting_before(first):
        token = graph.placeholder(TOKEN)
    with fake_mode_of(n.meta["val"] for n in graph.find_nodes(op="placeholder") if n is not token):
        token.meta["val"] = new_token()
    made = []
    for node in found:
        getitem: Any = operator.getitem
        called = insert_before(node, with_effects, (token, node.target, *map(_unnamed, node.args)), dict(node.kwargs))
        made.append(insert_before(node, getitem, (called, 0)).name)
        graph.erase_node(node)
    return (token.name, *made)


def with_bare_assertions(module: fx.GraphModule) -> fx.GraphModule:
    """The module as a compiler takes it: a copy whose assertions of sizes stand by themselves, if there are any.

    Inductor keeps such an assertion because of what it is, and has no form of it that gives a token.
    """
    if not any(_asserts_size(node) for node in module.graph.nodes):
        return module
    copied = copied_graph(module)
    for node in [n for n in copied.graph.nodes if _asserts_size(n)]:
        token, target, *args = node.args
        for item in list(node.users):
            item.replace_all_uses_with(token)
            copied.graph.erase_node(item)
        node.target, node.args = target, tuple(args)
        node.meta = {**node.meta, "val": None}
    copied.recompile()
    return copied


def _asserts_size(node: fx.Node) -> bool:
    return node.target is with_effects and node.args[1] is aten._assert_scalar.default


def _unnamed(argument: Any) -> Any:
    """A message without the name of the node, which means nothing to its reader and tells equal blocks apart."""
    return re.sub(r" on node '\w+'$", "", argument) if isinstance(argument, str) else argument
