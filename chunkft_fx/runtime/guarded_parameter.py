"""Keeps old weights from being seen: who reads or writes a parameter whose updates may still run waits for them first.

A guarded parameter is the same object with another class for so long (`GuardedParameter`): torch asks that class before
each of its functions that is given the parameter. Gradients and what describes a tensor are no matter of updates, so
`zero_grad()`, schedulers and logging of shapes do not wait. What reads past torch's Python functions is not seen: an
alias that was taken before, ``torch.func``, collectives and kernels that were given one.

A guarded parameter alone holds what waits for it: a model that nobody holds any more is freed with its updates.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from chunkft_fx.torch_internals import alias_as_parameter, is_called_by, outside_graphs, tree_leaves

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
_WAITS: weakref.WeakValueDictionary[int, Callable[[], None]] = weakref.WeakValueDictionary()


class GuardedParameter(nn.Parameter):
    """A parameter whose updates may still run; no one makes one, `guard` has parameters be of this class for a time."""

    wait: Callable[[], None]

    def __new__(cls, data: Tensor | None = None, requires_grad: bool = True) -> nn.Parameter:  # type: ignore[misc]
        """What ``type(parameter)(...)`` makes."""
        return nn.Parameter(torch.empty(0) if data is None else data, requires_grad)

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
        if func is Tensor.detach and is_called_by(nn.Parameter.__new__):
            # `nn.Parameter(p)` asks any class but its own for a tensor of that class, which by now is its own
            return alias_as_parameter(args[0])
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
        p.__class__ = GuardedParameter
        assert isinstance(p, GuardedParameter)
        p.wait = wait
        _WAITS[id(p)] = wait


@outside_graphs
def unguard(parameters: Iterable[nn.Parameter]) -> None:
    """Take the guard off these parameters."""
    for p in parameters:
        p.__class__ = nn.Parameter
        p.__dict__.pop("wait", None)
        _WAITS.pop(id(p), None)


@outside_graphs
def wait_for_all() -> None:
    """Wait for the updates of every guarded parameter: functions are given parameters in all sorts of containers.

    A function under `torch.compile` ends its graph here, and goes on with parameters of their own class.
    """
    for wait in {ref() for ref in _WAITS.valuerefs()}:
        if wait is not None:
            wait()
