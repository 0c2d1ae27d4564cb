"""Rewrites look-ups whose gradient would be sparse to give a dense one: a slice is dense, and has the same numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.nn import functional

# Where each function that looks rows up takes its argument ``sparse``.
_POSITION: dict[Any, int] = {
    functional.embedding: 6,
    functional.embedding_bag: 7,
    torch.embedding: 4,
    torch.embedding_bag: 5,
}


def with_dense_gradients(gm: fx.GraphModule) -> None:
    """Turn ``sparse=True`` off in all look-ups of Dynamo's graph and of the graphs that it holds."""
    for module in gm.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            position = _POSITION.get(node.target) if node.op == "call_function" else None
            if position is not None and len(node.args) > position:
                node.update_arg(position, False)
            if position is not None and "sparse" in node.kwargs:
                node.update_kwarg("sparse", False)
        if isinstance(module, fx.GraphModule):
            module.recompile()
