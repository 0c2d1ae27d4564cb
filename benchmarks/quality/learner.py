"""What trains a model: a step over a batch at a rate; and steps of torch optimizers on float32 masters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]
Step = Callable[[Batch, float], Tensor]
Named = dict[str, Tensor]


@dataclass(frozen=True)
class Learner:
    """``step(batch, lr)`` trains on a batch and returns its loss before that; ``evaluated`` is for held-out text."""

    step: Step
    evaluated: Any


class Masters:
    """Float32 masters of the weights of a model that have a gradient: float32 weights are their own."""

    def __init__(self, model: nn.Module) -> None:
        self._weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.tensors: Named = {
            name: p if p.dtype == torch.float32 else nn.Parameter(p.detach().float().clone())
            for name, p in self._weights.items()
        }

    def take_gradients(self) -> None:
        """Give the masters the gradients of their weights."""
        for name, p in self._weights.items():
            master = self.tensors[name]
            if master is not p:
                assert p.grad is not None
                master.grad, p.grad = p.grad.float(), None

    @torch.no_grad()
    def write(self) -> None:
        """Round the masters into their weights, and drop the gradients."""
        for name, p in self._weights.items():
            master = self.tensors[name]
            if master is not p:
                p.copy_(master)
            master.grad = None


def on_masters(
    model: nn.Module, make: Callable[[Named], torch.optim.Optimizer], max_grad_norm: float | None, is_compiled: bool
) -> Learner:
    """A learner of what ``make`` returns for the masters; ``is_compiled``: by ``torch.compile``, on a GPU."""
    masters = Masters(model)
    optimizer = make(masters.tensors)
    called = torch.compile(model) if is_compiled and next(model.parameters()).is_cuda else model

    def step(batch: Batch, lr: float) -> Tensor:
        set_rate(optimizer, lr)
        loss: Tensor = called(**batch).loss
        loss.backward()
        masters.take_gradients()
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(masters.tensors.values(), max_grad_norm)
        optimizer.step()
        masters.write()
        return loss.detach()

    return Learner(step, model)


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Every group gets the rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr
