"""Ownership: which compiled module trains which parameters, so that nothing else updates or compiles them unseen.

A parameter belongs to one compiled module at most, as long as that lives. Torch calls a hook of this file before the
step of every optimizer in the process: one that would update parameters of a compiled module sees no gradients of
their whole, and is refused by name instead of training nothing.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

from chunkft_fx.errors import AlreadyCompiled, OptimizerConflict

_OWNERS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # parameter to weak reference of its compiled module
_OWN_OPTIMIZERS: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def claim(parameters: Iterable[Tensor], owner: Any) -> None:
    """Make a compiled module the owner of these parameters; `AlreadyCompiled` if one is another living module's."""
    held = list(parameters)
    if any(_other_owner(p, owner) for p in held):
        gc.collect()  # one that nobody can reach any more owns nothing
    if any(_other_owner(p, owner) for p in held):
        raise AlreadyCompiled(
            "parameters of this model are trained by a module that chunkft_fx.compile returned before; use that "
            "module, or delete it and its optimizer first"
        )
    for p in held:
        _OWNERS[p] = weakref.ref(owner)


def release(parameters: Iterable[Tensor], owner: Any) -> None:
    """Take ownership of these parameters back from a compiled module."""
    for p in parameters:
        if p in _OWNERS and _OWNERS[p]() is owner:
            del _OWNERS[p]


def allow(optimizer: Optimizer) -> None:
    """Let an optimizer of this library step."""
    _OWN_OPTIMIZERS.add(optimizer)


def _other_owner(parameter: Tensor, owner: Any) -> bool:
    known = _OWNERS.get(parameter)
    return known is not None and known() not in (None, owner)


def _refuse_foreign(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not len(_OWNERS) or optimizer in _OWN_OPTIMIZERS:
        return
    for group in optimizer.param_groups:
        for p in group["params"]:
            known = _OWNERS.get(p)
            if known is not None and known() is not None and p.requires_grad:
                name = next((n for n, q in known().named_parameters() if q is p), "a parameter")
                raise OptimizerConflict(
                    f"{type(optimizer).__module__}.{type(optimizer).__qualname__} was to update {name!r}, which a "
                    "module from chunkft_fx.compile trains, a slice at a time; use chunkft_fx.AdamW(compiled_model) "
                    "instead, or give this optimizer other parameters only"
                )


_HOOK: Callable[..., Any] = register_optimizer_step_pre_hook(_refuse_foreign).remove
