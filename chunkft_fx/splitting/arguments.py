"""Decides which tensors of a call hold the batch, and divides them; whether that was right, the proof says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chunkft_fx.splitting.proof import NotSeparable
from chunkft_fx.splitting.relations import SAME, Relation, Split
from chunkft_fx.torch_internals import tree_leaves, tree_map

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def samples(arguments: Arguments) -> int:
    """The size of the batch: the most frequent first size of the tensors of a call; 1 where there is none above."""
    sizes = [leaf.shape[0] for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor) and leaf.ndim]
    counted = Counter(size for size in sizes if size > 1)
    return counted.most_common(1)[0][0] if counted else 1


@dataclass(frozen=True)
class Divided:
    """The arguments of each part of a call; ``origins`` has for a part's tensor, by id, the whole's and the number."""

    calls: tuple[Arguments, ...]
    origins: dict[int, tuple[Tensor, int]]

    def relations(self, whole: Sequence[Any], parts: Sequence[Sequence[Any]]) -> tuple[Relation, ...]:
        """What the tensors among the inputs of the graphs, of the whole and of each part, are to each other, in order.

        Raises `NotSeparable` where one is neither the whole's own nor a part of it.
        """
        tensors = [[leaf for leaf in inputs if isinstance(leaf, Tensor)] for inputs in (whole, *parts)]
        if len({len(found) for found in tensors}) > 1:
            raise NotSeparable("a part of it is traced with other inputs")
        return tuple(self._relation(w, ms) for w, *ms in zip(*tensors, strict=True))

    def _relation(self, whole: Tensor, parts: Sequence[Tensor]) -> Relation:
        if all(_is_same(whole, m) for m in parts):
            return SAME
        origins = [self.origins.get(id(m), (None, -1)) for m in parts]
        if all(tensor is whole and number == i for i, (tensor, number) in enumerate(origins)):
            return Split(0)
        raise NotSeparable(
            f"its graph reads a tensor of shape {list(whole.shape)} that is neither an argument nor a part of the model"
        )


def divided(arguments: Arguments, parts: int) -> Divided:
    """A call in ``parts`` equal ones: of each tensor whose first size is the batch's a share, all else as it is."""
    size = samples(arguments)
    origins: dict[int, tuple[Tensor, int]] = {}
    calls = []
    for number in range(parts):
        # a tensor that is given twice is one tensor in each part, too
        shares: dict[int, Tensor] = {}

        def share(leaf: Any, number: int = number, shares: dict[int, Tensor] = shares) -> Any:
            if not isinstance(leaf, Tensor) or not leaf.ndim or leaf.shape[0] != size:
                return leaf
            if id(leaf) not in shares:
                shares[id(leaf)] = leaf.narrow(0, number * (size // parts), size // parts)
                origins[id(shares[id(leaf)])] = leaf, number
            return shares[id(leaf)]

        calls.append(tree_map(share, arguments))
    return Divided(tuple(calls), origins)


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two inputs are one; a number can come as a new tensor each time."""
    if a is b:
        return True
    is_alike = a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
    return is_alike and a.numel() == 1 and bool(torch.equal(a, b))
