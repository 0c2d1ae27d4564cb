"""Decides at which module paths a model is cut into blocks, and says which block a node or a parameter lies in."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import fx

from chunkft_fx.errors import ChunkFTWarning


def locate(graph: fx.Graph, modules: Iterable[tuple[str, torch.nn.Module]]) -> None:
    """Write down for each node of a captured graph in which of the (named) modules it was called.

    Modules are known by identity: how the traced code gets at one (through a decorator's arguments, a closure, a
    wrapper) says nothing about its name.
    """
    paths = {str(id(module)): name for name, module in modules}
    for node in graph.nodes:
        node.meta["module_path"] = innermost(node, paths)


def innermost(node: fx.Node, paths: Mapping[str, str]) -> str | None:
    """The path of the innermost module that a node was called in, of modules known by ``str(id(module))``."""
    # torch calls an entry of its stack by the module's id, with "@" and a number from the second call on
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    known = (paths.get(str(key).split("@")[0]) for key in reversed(stack))
    return next((path for path in known if path), None)


def module_path(node: fx.Node) -> str | None:
    """The dotted path of the innermost module a node belongs to; None for the model itself, or unknown."""
    path: str | None = node.meta.get("module_path")
    return path


def block_paths(modules: Iterable[tuple[str, torch.nn.Module]]) -> tuple[str, ...]:
    """Module paths that become regions: the repeated blocks, or of a model without such blocks its outermost modules
    that own parameters directly."""
    named = list(modules)
    alone = (name for name, module in named if name and any(True for _ in module.parameters(recurse=False)))
    return repeated_blocks(named) or tuple(alone)


def repeated_blocks(modules: Iterable[tuple[str, torch.nn.Module]]) -> tuple[str, ...]:
    """Paths of numbered modules with children of their own, outermost first.

    A block that is alone in its container repeats nothing: its children are looked at instead (as for
    a model in a list, between two layers).
    """
    numbered = [name for name, m in modules if name.rsplit(".", 1)[-1].isdigit() and any(True for _ in m.children())]
    siblings = Counter(name.rpartition(".")[0] for name in numbered)
    blocks: list[str] = []
    for name in numbered:
        if siblings[name.rpartition(".")[0]] > 1 and not any(name.startswith(f"{b}.") for b in blocks):
            blocks.append(name)
    return tuple(blocks)


def warn_if_unseen(modules: Iterable[tuple[str, torch.nn.Module]], used: Iterable[str], labels: Iterable[str]) -> None:
    """Warn when the repeated blocks of a model were cut nowhere, though their parameters are ``used``.

    ``labels`` are those of the regions.
    """
    blocks = repeated_blocks(modules)
    if not blocks or not set(blocks).isdisjoint(labels) or not any(label_of(name, blocks) for name in used):
        return
    warnings.warn(
        f"the forward reads the weights of this model's {len(blocks)} blocks (the first is {blocks[0]}) but calls "
        "none of them as a module, so it cannot be cut between them, and steps compute and hold more than they need. "
        "Call the blocks, as in block(x), instead of reading their weights",
        ChunkFTWarning,
        stacklevel=2,
    )


def region_of_parameters(names: Sequence[str], blocks: Sequence[str]) -> list[int]:
    """For each parameter in order, the number of its part: a block, or a run of parameters between blocks."""
    labels = [label_of(name, blocks) for name in names]
    numbers, current = [], -1
    for i, label in enumerate(labels):
        if i == 0 or label != labels[i - 1]:
            current += 1
        numbers.append(current)
    return numbers


def label_of(path: str, blocks: Iterable[str]) -> str:
    """The block that a module path or parameter name lies in, or ``""`` outside of all blocks."""
    return next((b for b in blocks if path == b or path.startswith(f"{b}.")), "")
