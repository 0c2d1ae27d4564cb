"""Writes new nodes with their metadata, and compares values without guards: the building blocks of passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx

from chunkft_fx.torch_internals import fake_mode_of, tree_leaves, writes_memory
from chunkft_fx.torch_sizes import hint, is_known_true


def insert_before(
    anchor: fx.Node,
    target: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any] | None = None,
    *,
    like: fx.Node | None = None,
) -> fx.Node:
    """Insert ``target(*args, **kwargs)`` before ``anchor``, with ``meta["val"]`` computed on fake values.

    Tag and module provenance come from ``like`` (default ``anchor``), so that partitioners and reports
    see the new node as a part of the code it was made from.
    """
    graph = anchor.graph
    with graph.inserting_before(anchor):
        node = graph.call_function(target, tuple(args), kwargs or {})
    source = like if like is not None else anchor
    for key in ("partitioner_tag", "module_path", "seq_nr", "stack_trace"):
        if key in source.meta:
            node.meta[key] = source.meta[key]
    node.meta["val"] = fake_value(node)
    return node


def fake_value(node: fx.Node) -> Any:
    """Run a node's target on the fake values of its operands, under their graph's fake mode."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    assert callable(node.target)
    # operators without operands, such as full, take the mode from the graph's inputs
    inputs = (n.meta["val"] for n in node.graph.find_nodes(op="placeholder"))
    with fake_mode_of(chain(tree_leaves((args, kwargs)), inputs)):
        return node.target(*args, **kwargs)


def shape(node: fx.Node) -> tuple[int | torch.SymInt, ...]:
    """The sizes of a node's value: ints, or symbolic sizes for dynamic dimensions."""
    return tuple(node.meta["val"].shape)


def same(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """True when two sizes are known to be equal without adding a guard."""
    return (isinstance(a, int) and isinstance(b, int) and a == b) or is_known_true(a == b)


def replace_node(node: fx.Node, other: fx.Node) -> None:
    """Have every reader of a node read another one, and erase the node."""
    node.replace_all_uses_with(other)
    node.graph.erase_node(node)


def drop_dead(graph: fx.Graph) -> int:
    """Erase nodes that no output needs; returns how many. Only operators that write memory count as needed.

    torch's default also keeps operators tagged as random, such as attention without dropout and its
    backward; their draws are not a result anybody asked for.
    """
    before = len(graph.nodes)
    graph.eliminate_dead_code(is_impure_node=_is_impure)
    return before - len(graph.nodes)


def _is_impure(node: fx.Node) -> bool:
    if node.op in ("placeholder", "output"):
        return True
    return writes_memory(node.target)


def tensor_nbytes(value: Any) -> int:
    """Bytes of a fake tensor's elements; symbolic sizes count with their traced value; 0 for numbers."""
    if not isinstance(value, Tensor):
        return 0
    return hint(value.numel()) * value.element_size()
