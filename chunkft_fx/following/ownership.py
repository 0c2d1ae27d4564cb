"""Decides which compiled module trains which parameters, so that nothing else updates or compiles them unseen.

A parameter belongs to one compiled module at most, as long as that lives. Torch calls a hook of this file before the
step of every optimizer in the process: one that would update parameters of a compiled module sees no gradients of
their whole, and is refused by name instead of training nothing.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch import Tensor
from torch.optim.optimizer import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from chunkft_fx.errors import AlreadyCompiled, OptimizerConflict
from chunkft_fx.torch_internals import before_every_optimizer_step

_OWNERS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # parameter to weak reference of its compiled module
_OWN_OPTIMIZERS: weakref.WeakSet[Optimizer] = weakref.WeakSet()


class Owner(Protocol):
    """What ownership asks of a compiled module."""

    @property
    def is_bound(self) -> bool: ...

    def give_up(self) -> None: ...


def claim(parameters: Iterable[Tensor], owner: Owner) -> None:
    """Make a compiled module the owner of these parameters.

    Another living module that has them gives them up if it has not trained yet: a budget was too small, say, and its
    user compiles again. Raises `AlreadyCompiled` if it has.
    """
    held = list(parameters)
    if any(o.is_bound for o in _others(held, owner)):
        gc.collect()  # one that nobody can reach any more owns nothing
    others = _others(held, owner)
    if any(o.is_bound for o in others):
        raise AlreadyCompiled(
            "parameters of this model are trained by a module that chunkft_fx.compile returned before; use that "
            "module, or delete it and its optimizer first"
        )
    for other in others:
        other.give_up()
    for p in held:
        _OWNERS[p] = weakref.ref(owner)


def release(parameters: Iterable[Tensor], owner: Owner) -> None:
    """Let parameters that a compiled module owns be their user's own again."""
    for p in parameters:
        if p in _OWNERS and _OWNERS[p]() is owner:
            del _OWNERS[p]


def _others(parameters: Iterable[Tensor], owner: Owner) -> list[Owner]:
    """The other living owners of these parameters, each once."""
    known = [_OWNERS[p]() for p in parameters if p in _OWNERS]
    return list({id(o): o for o in known if o is not None and o is not owner}.values())


def allow(optimizer: Optimizer) -> None:
    """Let an optimizer of this library step."""
    _OWN_OPTIMIZERS.add(optimizer)


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
                    "or another optimizer of chunkft_fx instead, or give this optimizer other parameters only"
                )


_HOOK: Callable[[], None] = before_every_optimizer_step(_refuse_foreign)
