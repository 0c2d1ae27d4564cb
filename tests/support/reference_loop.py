"""The reference that runs of users' actions are held to: the plain model, and AdamW written out element by element.

Chunks come from the compiled module (`Reference.step` takes its active slices); everything else is computed from the
plain model alone: dense gradients by autograd, states and step counts for each element.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from chunkft_fx.plan.chunk import Slice


@dataclass
class ElementStates:
    """AdamW's states of one parameter, with a step count for each element."""

    mean: Tensor
    square: Tensor
    steps: Tensor


@dataclass
class Reference:
    """A plain model and its optimizer; ``lr``, ``betas``, ``eps`` and ``decay`` as of `chunkft_fx.AdamW`."""

    model: nn.Module
    lr: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    decay: float = 1e-2
    states: dict[str, ElementStates] = field(default_factory=dict)

    def slice_norm(self, active: Sequence[Slice]) -> float:
        """The norm of the dense gradient's parts that belong to these slices."""
        parts = [part for part in (self._part(s) for s in active) if part is not None]
        return float(torch.stack([p.double().norm() for p in parts]).norm()) if parts else 0.0

    def scale(self, factor: float) -> None:
        """Multiply all gradients, as clipping does."""
        for p in self.model.parameters():
            if p.grad is not None:
                p.grad.mul_(factor)

    @torch.no_grad()
    def step(self, active: Sequence[Slice]) -> None:
        """One step of AdamW on these slices, by the gradients that the plain model holds."""
        for s in active:
            gradient = self._part(s)
            if gradient is not None:
                self._update(s, gradient)

    def zero(self) -> None:
        """Drop the gradients."""
        self.model.zero_grad()

    def forget(self) -> None:
        """Begin with no states."""
        self.states.clear()

    def _part(self, s: Slice) -> Tensor | None:
        gradient = self.model.get_parameter(s.name).grad
        return None if gradient is None else _cut(gradient, s)

    def _update(self, s: Slice, gradient: Tensor) -> None:
        parameter = self.model.get_parameter(s.name)
        state = self.states.setdefault(
            s.name, ElementStates(torch.zeros_like(parameter), torch.zeros_like(parameter), torch.zeros_like(parameter))
        )
        beta1, beta2 = self.betas
        weight = _cut(parameter.detach(), s)
        mean, square, steps = (_cut(t, s) for t in (state.mean, state.square, state.steps))
        steps += 1
        weight.mul_(1 - self.lr * self.decay)
        mean.mul_(beta1).add_(gradient, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        denominator = (square / (1 - beta2**steps)).sqrt() + self.eps
        weight.sub_(self.lr * (mean / (1 - beta1**steps)) / denominator)


def _cut(whole: Tensor, s: Slice) -> Tensor:
    return whole if whole.ndim == 0 else whole.narrow(s.dim, s.start, s.length)
