"""Decides what becomes of gradients that reach parameters from outside of the compiled call: the gradient gate.

A weight can also be used by the caller: an embedding looked up before the call, a penalty on weights, a returned
weight. Autograd then gives its parameter a dense gradient. If the parameter has an active slice, the gate
keeps that slice of the gradient, added to the gradient that comes from the call. Otherwise it drops the gradient,
because the parameter's chunk is not active. The gate does so in hooks that run after accumulation. They are registered
first, so they run first, and the user's own hooks see the gradient that they leave.

A gradient of bfloat16 or float16 parameters is kept in float32 (``Tensor.grad_dtype``) while the gate is there.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from chunkft_fx.gradients.slice_gradient import SliceGradient, cut_from
from chunkft_fx.gradients.slices import ActiveSlice
from chunkft_fx.graph.layout import wide_dtype
from chunkft_fx.torch_internals import hooks_of


@dataclass
class Arrivals:
    """Where gradients came from since the last optimizer step."""

    through: bool = False  # a backward of the compiled module ran
    outside: bool = False  # autograd gave a parameter a gradient, wherever it came from
    updated: bool = False  # a backward of the compiled module updated weights itself


class GateOwner(Protocol):
    """What a gate needs of the compiled module."""

    def active_slice(self, name: str) -> ActiveSlice | None:
        """The active slice of the parameter of this name; None if it has none."""

    def came_to_parameter(self) -> None:
        """Note that autograd gave a parameter a gradient, wherever it came from."""


@dataclass
class _Guarded:
    """A parameter with a hook of the gate's, under the name that it has now."""

    name: str
    parameter: weakref.ref[nn.Parameter]
    handle: Any = None


class GradientGate:
    """The hooks on the parameters of one compiled module, which it removes with itself."""

    def __init__(self, owner: GateOwner) -> None:
        self._owner = weakref.ref(owner)
        self._guarded: dict[int, _Guarded] = {}  # by the parameter's id

    def guard(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Have hooks on exactly these parameters: those that need gradients, or needed them before and may hold one."""
        known = {id(p): (name, p) for name, p in parameters.items()}
        for key, guarded in list(self._guarded.items()):
            if key not in known or guarded.parameter() is not known[key][1]:
                self._remove(key)
        for key, (name, p) in known.items():
            if key in self._guarded:
                self._guarded[key].name = name  # it may have moved to another module
                if p.requires_grad:
                    _set_gradient_dtype(p, wide_dtype(p.dtype))  # it may have another dtype
            elif p.requires_grad:
                self._guarded[key] = _Guarded(name, weakref.ref(p))
                self._guarded[key].handle = _admit_through(self._owner, self._guarded[key], p)

    def hooked(self) -> str | None:
        """A parameter with a hook on its gradient that is not the gate's; None if there is none."""
        for guarded in self._guarded.values():
            parameter = guarded.parameter()
            if parameter is not None and hooks_of(parameter) - {guarded.handle.id}:
                return guarded.name
        return None

    def close(self) -> None:
        """Leave the parameters as they were."""
        for key in list(self._guarded):
            self._remove(key)

    def _remove(self, key: int) -> None:
        guarded = self._guarded.pop(key)
        guarded.handle.remove()
        parameter = guarded.parameter()
        if parameter is not None:
            _set_gradient_dtype(parameter, parameter.dtype)


def _admit_through(owner: weakref.ref[Any], guarded: _Guarded, parameter: nn.Parameter) -> Any:
    _set_gradient_dtype(parameter, wide_dtype(parameter.dtype))

    def admit(p: Tensor) -> None:
        module = owner()
        if module is None:
            return
        module.came_to_parameter()
        part = module.active_slice(guarded.name)
        if isinstance(p.grad, SliceGradient) or (part is not None and part.slice.is_whole):
            return
        gradient, p.grad = p.grad, None
        if part is not None and gradient is not None:
            p.grad = SliceGradient(cut_from(gradient, part.slice).clone(), part.slice, p.shape)

    if parameter.grad is not None:
        admit(parameter)  # it came before the gate was there
    return parameter.register_post_accumulate_grad_hook(admit)


def _set_gradient_dtype(parameter: Tensor, dtype: torch.dtype) -> None:
    """Set the dtype of a parameter's future gradients; a gradient of another dtype that it already has is dropped."""
    if parameter.dtype == dtype == parameter.grad_dtype:
        return
    if parameter.grad is not None and parameter.grad.dtype != dtype:
        parameter.grad = None
    parameter.grad_dtype = dtype
