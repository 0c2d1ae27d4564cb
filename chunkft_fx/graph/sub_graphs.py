"""Rewrites operators that take graphs as operands (``torch.cond``, ``scan``, ...) to callables that hold those graphs.

A trace keeps such graphs as attributes of its module. Regions are cut out of the trace and compared with each other,
so here an operator becomes one callable that holds its graphs itself: it stays whole, in one region, and equal ones
are equal by what they compute. No rule of a pass knows such an operator, so its results are computed whole.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from chunkft_fx.torch_internals import below_autograd, is_higher_order


class Closed:
    """A higher-order operator with its graphs in place, by position among its arguments; called with the others."""

    def __init__(self, operator: Any, graphs: Mapping[int, fx.GraphModule], key: str) -> None:
        self.operator, self.graphs = operator, dict(graphs)
        # the code of a graph that calls this finds it under these names
        self.__name__ = self.__qualname__ = f"{operator.__name__}_{key}"
        self.__module__ = __name__

    def __str__(self) -> str:
        return self.__name__

    def __call__(self, *args: Any) -> Any:
        return below_autograd(self.operator, *self.spread(args, self.graphs))

    def spread(self, args: tuple[Any, ...], graphs: Mapping[int, Any]) -> tuple[Any, ...]:
        """All operands of the operator: ``graphs`` at their positions, ``args`` at the rest."""
        rest = iter(args)
        return tuple(graphs[i] if i in graphs else next(rest) for i in range(len(args) + len(graphs)))


def close_all(module: fx.GraphModule) -> None:
    """Close the higher-order operators of a module's graph over their graphs."""
    for node in list(module.graph.nodes):
        if node.op == "call_function":
            close(module, node)
    for node in module.graph.find_nodes(op="get_attr"):
        if not node.users:
            module.graph.erase_node(node)


def close(module: nn.Module, node: fx.Node) -> None:
    """Rewrite a call of a higher-order operator in ``module``'s graph to its closed form, if it takes graphs.

    So are those inside of its graphs.
    """
    graphs = {i: attribute(module, a) for i, a in enumerate(node.args) if _is_graph(module, a)}
    if not graphs or not is_higher_order(node.target):
        return
    for graph in graphs.values():
        close_all(graph)
        graph.recompile()
    node.args, node.target = (
        tuple(a for i, a in enumerate(node.args) if i not in graphs),
        Closed(node.target, graphs, _key(node.target, graphs)),
    )


def _is_graph(module: nn.Module, argument: Any) -> bool:
    is_attribute = isinstance(argument, fx.Node) and argument.op == "get_attr"
    return is_attribute and isinstance(attribute(module, argument), fx.GraphModule)


def attribute(module: nn.Module, node: Any) -> Any:
    """What a ``get_attr`` node stands for."""
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def _key(operator: Any, graphs: Mapping[int, fx.GraphModule]) -> str:
    """A hash of an operator and of what its graphs compute; names of values and of graphs do not count."""
    digest = hashlib.sha256(str(operator).encode())
    for position, graph in graphs.items():
        digest.update(f"{position}:{_graph_key(graph)}".encode())
    return digest.hexdigest()[:12]


def _graph_key(module: fx.GraphModule) -> str:
    numbers: dict[fx.Node, int] = {}
    lines = []
    for i, node in enumerate(module.graph.nodes):
        numbers[node] = i
        args = fx.map_arg((node.args, node.kwargs), lambda n: f"%{numbers[n]}")
        target: Any = node.target if node.op == "call_function" else ""
        if node.op == "get_attr":
            value = attribute(module, node)
            # a constant is what it is; a graph counts by what it computes
            target = _graph_key(value) if isinstance(value, fx.GraphModule) else id(value)
        lines.append(f"{node.op} {target} {args} {_form(node.meta.get('val'))}")
    return hashlib.sha256(renamed("\n".join(lines), {}).encode()).hexdigest()


def renamed(text: str, names: dict[str, str]) -> str:
    """A text with the names of sizes that depend on data numbered as they come; ``names`` keeps them between calls."""
    return re.sub(r"\bu\d+\b", lambda m: names.setdefault(m[0], f"size{len(names)}"), text)


def _form(value: Any) -> str:
    if isinstance(value, Tensor):
        strides = tuple(value.stride()) if value.layout is torch.strided else ()
        return f"{value.dtype}{tuple(value.shape)}{strides}{value.device}"
    return ", ".join(map(_form, value)) if isinstance(value, (tuple, list)) else str(value)


def opened(module: fx.GraphModule) -> fx.GraphModule:
    """The module as a compiler takes it: a copy with closed operators spelled as a trace has them, if there are any."""
    if not any(isinstance(node.target, Closed) for node in module.graph.nodes):
        return module
    copied = copied_graph(module)
    for node in list(copied.graph.nodes):
        if not isinstance(node.target, Closed):
            continue
        closed, attributes = node.target, {}
        for i, graph in closed.graphs.items():
            name = f"{closed.__name__}_{i}"
            copied.add_submodule(name, opened(graph))
            with copied.graph.inserting_before(node):
                attributes[i] = copied.graph.get_attr(name)
        node.args = closed.spread(node.args, attributes)
        node.target = closed.operator
    copied.recompile()
    return copied


def copied_graph(module: fx.GraphModule) -> fx.GraphModule:
    """The module with a copy of its graph; metadata values are shared."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    graph.output_node().meta = dict(module.graph.output_node().meta)
    return fx.GraphModule(module, graph)
