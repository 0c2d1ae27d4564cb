"""Predicts what ``to``, ``cuda``, ``half`` and their like would do to a model's parameters, on empty tensors."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from chunkft_fx.errors import ChunkFTWarning
from chunkft_fx.gradients.used import UsedGradient


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
    """Take the gradients off parameters while these are moved, and give them back after.

    A parameter that got another dtype, or left the device of its gradient, gets none back, with a `ChunkFTWarning`.
    """
    held = [(p, p.grad, p.dtype, p.device) for p in parameters if p.grad is not None]
    for p, *_ in held:
        p.grad = None
    dropped = 0
    try:
        yield
    finally:
        for p, gradient, dtype, device in held:
            assert gradient is not None
            if p.dtype == dtype and p.device in (device, gradient.device):
                p.grad = gradient
            else:
                dropped += not isinstance(gradient, UsedGradient)
        if dropped:
            warn_of_dropped_gradients()


def warn_of_dropped_gradients() -> None:
    """Say that gradients which waited for their step are gone, since the model is another one now."""
    warnings.warn(
        "the model was changed or moved while gradients waited for their optimizer step: they belong to the model as "
        "it was, and are dropped; change the model before the backward, or after the step",
        ChunkFTWarning,
        stacklevel=5,
    )
