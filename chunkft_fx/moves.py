"""Moves: what ``to``, ``cuda``, ``half`` and their like would do to a model's parameters, found on empty tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Move:
    """Where parameters go: ``device`` (None: each stays where it is), and what each of their dtypes becomes."""

    device: torch.device | None
    dtypes: Mapping[torch.dtype, torch.dtype]

    @classmethod
    def of(cls, model: nn.Module, fn: Callable[[Tensor], Tensor]) -> Move:
        """The move that a function of one tensor makes with the parameters of a model."""
        kinds = {(p.dtype, p.device) for p in model.parameters()}
        after = {kind: fn(torch.empty(0, dtype=kind[0], device=kind[1])) for kind in kinds}
        stays = all(t.device == device for (_, device), t in after.items())
        device = None if stays and len(kinds) else next(iter(after.values())).device
        return cls(device, {dtype: t.dtype for (dtype, _), t in after.items()})

    @property
    def retypes(self) -> bool:
        """Whether any parameter gets another dtype."""
        return any(before != after for before, after in self.dtypes.items())

    def retyped(self, t: Tensor) -> Tensor:
        """A parameter with its new dtype, where it is."""
        return t.to(self.dtypes[t.dtype])


@contextlib.contextmanager
def gradients_aside(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Take the gradients off parameters while these are moved; they come back to those that kept shape and dtype."""
    held = [(p, p.grad, p.dtype) for p in parameters if p.grad is not None]
    for p, _, _ in held:
        p.grad = None
    try:
        yield
    finally:
        for p, gradient, dtype in held:
            if p.dtype == dtype and gradient is not None and gradient.device == p.device:
                p.grad = gradient
