"""Keeps old weights from being seen: who reads or writes a parameter whose updates may still run waits for them first.

A guarded parameter is the same object with another class for so long (`GuardedParameter`): torch asks that class before
each of its functions that is given the parameter. Gradients and what describes a tensor are no matter of updates, so
`zero_grad()`, schedulers and logging of shapes do not wait. What reads past torch's Python functions is not seen: an
alias that was taken before, ``torch.func``, collectives and kernels that were given one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from chunkft_fx.torch_internals import tree_leaves

_ATTRIBUTES: tuple[Any, ...] = (
    Tensor.device,
    Tensor.dtype,
    Tensor.grad_fn,
    Tensor.is_cpu,
    Tensor.is_cuda,
    Tensor.is_leaf,
    Tensor.is_meta,
    Tensor.is_sparse,
    Tensor.layout,
    Tensor.ndim,
    Tensor.requires_grad,
    Tensor.shape,
)
_GRADIENT: Any = Tensor.grad
# What tells of a parameter, or concerns its gradient, and neither reads nor writes its values.
_WITHOUT_VALUES = {
    *(attribute.__get__ for attribute in _ATTRIBUTES),
    _GRADIENT.__get__,
    _GRADIENT.__set__,
    _GRADIENT.__delete__,
    Tensor.dim,
    Tensor.element_size,
    Tensor.is_complex,
    Tensor.is_floating_point,
    Tensor.nelement,
    Tensor.numel,
    Tensor.size,
    Tensor.stride,
}
# By identity of a guarded parameter, what waits for its updates.
_WAITS: dict[int, Callable[[], None]] = {}


class GuardedParameter(nn.Parameter):
    """A parameter whose updates may still run; no one makes one, `guard` has parameters be of this class for a time."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _WITHOUT_VALUES:
            return nn.Parameter.__torch_function__(func, types, args, kwargs or {})
        wait_for_all()
        for value in tree_leaves((args, kwargs)):
            if type(value) is cls:  # `swap_tensors` gave the class to another object
                unguard([value])
        return func(*args, **(kwargs or {}))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        wait_for_all()
        return copy.deepcopy(self, memo)


def is_guardable(parameter: Tensor) -> bool:
    """Whether a tensor is a parameter of torch's own class; others have ways of their own to be read."""
    return type(parameter) is nn.Parameter


def guard(parameters: Iterable[nn.Parameter], wait: Callable[[], None]) -> None:
    """Have ``wait`` called before anyone reads or writes one of these; it has to take the guard off."""
    for p in parameters:
        _WAITS[id(p)] = wait
        p.__class__ = GuardedParameter


def unguard(parameters: Iterable[nn.Parameter]) -> None:
    """Take the guard off these parameters."""
    for p in parameters:
        p.__class__ = nn.Parameter
        _WAITS.pop(id(p), None)


def wait_for_all() -> None:
    """Wait for the updates of every guarded parameter: functions are given parameters in all sorts of containers."""
    for wait in set(_WAITS.values()):
        wait()
