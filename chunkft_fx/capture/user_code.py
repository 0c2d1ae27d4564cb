"""Says where in the user's code a node of a trace, an error of torch's or a derivative comes from, for messages."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx

from chunkft_fx.errors import ChunkFTError, UnsupportedGraph
from chunkft_fx.torch_internals import dynamo_value, holds_graphs

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in [^\n]*\n(?!\s*File ")[^\S\n]*([^\n]*)')
# Whose frames say nothing to users: torch's, and this package's.
_OTHERS = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))

_NUMBERS = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool, torch.Size)


def where(node: fx.Node) -> str:
    """`` (file, line n: code)`` of the user's line that a node was traced from, or nothing.

    Of an input, which no line makes, it is the first line that reads it.
    """
    for traced in (node, *node.users):
        place = where_in(traced.meta.get("stack_trace") or "")
        if place:
            return place
    return ""


def where_in(text: str) -> str:
    """`` (file, line n: code)`` of the innermost line outside torch in a text with stack frames, or nothing.

    ``text`` is what torch records with a node, or the message of an error that it raised while tracing.
    """
    frames = [found for found in _FRAME.findall(text) if not found[0].startswith(_OTHERS)]
    if not frames:
        return ""
    file, line, code = frames[-1]
    return f" ({file}, line {line}: {code.strip()})"


def own_derivative(gm: fx.GraphModule) -> str:
    """What in Dynamo's graph has a derivative that the user wrote, or a hook on gradients, and where; or nothing.

    Only operators that hold graphs can; of these, activation checkpointing changes no derivative.
    """
    for module in gm.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            if holds_graphs(node.target) and node.target is not torch.ops.higher_order.tag_activation_checkpoint:
                return f"{node.target}{where(node)}"
    return ""


def path_of(gm: fx.GraphModule) -> tuple[str, ...]:
    """Every call in Dynamo's graph with what it is given, but for numbers: the path that the forward took.

    Two traces of one model have equal paths if they differ in sizes alone. Unlike a graph of operators it has where
    gradients are cut off, and by what.
    """
    places: dict[fx.Node, str] = {}
    path: list[str] = []
    graphs = [module.graph for module in gm.modules() if isinstance(module, fx.GraphModule)]
    for node in (node for graph in graphs for node in graph.nodes):
        if not isinstance(dynamo_value(node), _NUMBERS):
            places[node] = f"%{len(places)}"
            name = getattr(node.target, "__name__", node.target)
            path.append(f"{node.op} {name} {_told([node.args, node.kwargs], places)}")
    return tuple(path)


def _told(given: Any, places: Mapping[fx.Node, str]) -> list[str]:
    """What a call is given, one after the other; nothing for numbers."""
    if isinstance(given, fx.Node):
        return [places[given]] if given in places else []
    if isinstance(given, slice):
        given = (given.start, given.stop, given.step)
    if isinstance(given, Mapping):
        given = [part for item in given.items() for part in item]
    if isinstance(given, (tuple, list)):
        return ["(", *(text for part in given for text in _told(part, places)), ")"]
    is_number = isinstance(given, (int, float)) and not isinstance(given, bool)
    return [] if is_number else [repr(given)]


@contextlib.contextmanager
def naming_the_forward_line() -> Iterator[None]:
    """Turn a failure to trace a backward pass into `UnsupportedGraph` with the line of forward that it belongs to.

    torch tells that line in a warning before it raises the error. All other warnings are given on as they are.
    """
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        try:
            yield
        except (ChunkFTError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            place = where_in("\n".join(str(warning.message) for warning in given))
            if not place:
                raise
            raise UnsupportedGraph(
                f"the backward pass of this line cannot be traced{place}: {type(error).__name__}: {error}"
            ) from error
    for warning in given:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
