"""Runs a step of a torch optimizer class on tensors whose states lie elsewhere between steps.

The class is made anew for each step, given the states that its last step left, and stepped: its own code decides what
an update is, on the CPU and on CUDA, where torch's classes take their foreach functions.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from chunkft_fx.torch_internals import step_without_hooks

# What a class keeps of one parameter, as it stands in `Optimizer.state`.
State = dict[str, Any]
# Of a group, but no option of the class.
_NO_OPTIONS = ("params", "param_names")


@dataclass(frozen=True)
class OptimizerClass:
    """A class of optimizer, and the options that it was ``given``."""

    kind: type[Optimizer]
    given: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The class as its user writes it."""
        if getattr(torch.optim, self.kind.__name__, None) is self.kind:
            return f"torch.optim.{self.kind.__name__}"
        return f"{self.kind.__module__}.{self.kind.__qualname__}"

    def over(self, weights: Sequence[Tensor], options: Mapping[str, Any]) -> Optimizer:
        """A new optimizer of the class with one group, with the options of it, over parameters in these memories."""
        parameters = [nn.Parameter(w.detach()) for w in weights]
        return self.kind([options_of(options) | {"params": parameters}], **self.given)

    def checked(self, weight: Tensor, options: Mapping[str, Any]) -> Optimizer:
        """The same over one weight; the class looks at a group's options as at its own, which it does not otherwise."""
        known = inspect.signature(self.kind.__init__).parameters
        own = {key: value for key, value in options_of(options).items() if key in known}
        return OptimizerClass(self.kind, {**self.given, **own}).over([weight], options)

    def step(
        self,
        options: Mapping[str, Any],
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        states: Sequence[State | None],
    ) -> list[State]:
        """One step in place, by states that a step left, or None before the first; gives those that it leaves.

        State tensors that are given are changed, or replaced by the class; gradients may be changed, too.
        """
        optimizer = self.over(weights, options)
        parameters: list[nn.Parameter] = optimizer.param_groups[0]["params"]
        for p, gradient, state in zip(parameters, gradients, states, strict=True):
            p.grad = gradient
            if state is not None:
                optimizer.state[p] = dict(state)
        step_without_hooks(optimizer)
        for p, weight in zip(parameters, weights, strict=True):
            if p.data_ptr() != weight.data_ptr():
                weight.copy_(p.detach())  # the class gave the parameter other memory
        return [{k: v for k, v in optimizer.state[p].items() if v is not None} for p in parameters]


def options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group's options, without its parameters."""
    return {key: value for key, value in group.items() if key not in _NO_OPTIONS}
