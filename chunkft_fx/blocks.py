"""Blocks: the module paths at whose borders a model is cut, and what lies in which block."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch
from torch import fx


def module_path(node: fx.Node) -> str | None:
    """The dotted path of the innermost module a node belongs to, or None when torch recorded none."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    if not stack:
        return None
    return normal_path(list(stack.values())[-1][0])


def normal_path(path: str) -> str:
    """Dynamo's spelling of a module path (``L['self'].layers[0]``) as ``named_modules`` spells it."""
    path = re.sub(r"^L\['[^']*'\]\.?", "", path)
    path = re.sub(r"_modules\[['\"](.+?)['\"]\]", r"\1", path)
    path = re.sub(r"\[['\"]?(.+?)['\"]?\]", r".\1", path)
    return path.strip(".")


def block_paths(modules: Iterable[tuple[str, torch.nn.Module]]) -> tuple[str, ...]:
    """Module paths that become regions: numbered modules with children of their own, outermost first.

    A model with no such blocks falls back to its outermost modules that own parameters directly.
    """
    named = [(name, module) for name, module in modules if name]
    blocks: list[str] = []
    for name, module in named:
        is_block = name.rsplit(".", 1)[-1].isdigit() and any(True for _ in module.children())
        if is_block and not any(name.startswith(f"{b}.") for b in blocks):
            blocks.append(name)
    if len(blocks) > 1:
        return tuple(blocks)
    return tuple(name for name, module in named if any(True for _ in module.parameters(recurse=False)))


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
