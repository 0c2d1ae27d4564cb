"""Defines the waiting gradient, which ``parameter.grad`` is while its bytes wait in host memory for the step.

A `WaitingGradient` has the shape of its parameter, and the dtype and device that the gradient would have on the device.
What is read of it is a copy on the device, made for that read, and what is changed in place goes back to host memory,
so torch's own tools (clipping, scalers, ``zero_grad``) and whatever reads gradients find what they expect. Three things
are known without a copy: the 2-norm and the largest absolute value, which were gathered when the gradient left the
device, and that it is all zeros. Multiplying it by a number is put off until it is read. A view of it would be one of a
copy, which changes nothing: it is refused with `WaitingGradientError`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

import torch
from torch import Tensor

from chunkft_fx.errors import WaitingGradientError
from chunkft_fx.gradients.slice_gradient import cut_from
from chunkft_fx.gradients.stand_in import StandIn
from chunkft_fx.plan.chunk import Slice
from chunkft_fx.torch_internals import returns_view, tree_leaves, tree_map, written_arguments

aten = torch.ops.aten


@dataclass(eq=False)
class WaitingPart:
    """What waits of one slice: ``host`` (None: zeros), to be multiplied by ``factors`` in turn when it is read.

    ``host`` has the slice's cut dimension in front, and may be narrower than the gradient's dtype. ``norm`` and
    ``largest`` are its 2-norm and its largest absolute value without the factors, 0-d on the device.
    """

    slice: Slice
    host: Tensor | None
    norm: Tensor
    largest: Tensor
    factors: list[Any] = field(default_factory=list)

    def scaled(self, value: Tensor) -> Tensor:
        """A tensor of the gradient's dtype, in place, multiplied by the factors."""
        for factor in self.factors:
            value.mul_(factor)
        return value

    def clear(self) -> None:
        """Be zeros."""
        self.host, self.factors = None, []
        self.norm, self.largest = torch.zeros_like(self.norm), torch.zeros_like(self.largest)


@dataclass(eq=False)
class Waiting:
    """The gradient of one parameter in host memory, in parts.

    ``bring`` makes a part's values on the device, with the slice's shape in the gradient's dtype; ``send`` puts such
    values into host memory and returns the part that they are then. ``problem`` says why nothing can be read any more.
    """

    name: str
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    parts: list[WaitingPart]
    bring: Callable[[WaitingPart], Tensor]
    send: Callable[[Slice, Tensor], WaitingPart]
    problem: str = ""

    def require(self) -> None:
        """Raise `WaitingGradientError` if nothing can be read any more."""
        if self.problem:
            raise WaitingGradientError(f"the gradient of {self.name!r} {self.problem}")

    def read(self) -> Tensor:
        """A copy on the device."""
        self.require()
        if len(self.parts) == 1:
            return self.bring(self.parts[0])
        whole = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        for part in self.parts:
            cut_from(whole, part.slice).copy_(self.bring(part))
        return whole

    def write(self, values: Tensor) -> None:
        """Have these values wait instead."""
        self.require()
        if values.shape != self.shape:
            raise WaitingGradientError(f"the gradient of {self.name!r} cannot get the shape {list(values.shape)}")
        self.parts[:] = [self.send(part.slice, cut_from(values, part.slice)) for part in self.parts]

    def clear(self) -> None:
        """Be zeros, whatever it was."""
        self.problem = ""
        for part in self.parts:
            part.clear()

    def multiply(self, factor: Any) -> None:
        """Be multiplied by a number, or by a 0-d tensor, when it is read."""
        self.require()
        kept = factor.detach().clone() if isinstance(factor, Tensor) else factor
        for part in self.parts:
            part.factors.append(kept)

    def norm(self, order: float) -> Tensor:
        """The 2-norm, or with ``order`` infinity the largest absolute value: 0-d on the device."""
        self.require()
        of_parts = [part.norm if order == 2 else part.largest for part in self.parts]
        for i, part in enumerate(self.parts):
            for factor in part.factors:
                of_parts[i] = (of_parts[i] * abs(factor)).to(self.dtype)
        return torch.linalg.vector_norm(torch.stack(of_parts), order)


class WaitingGradient(StandIn):
    """A gradient in host memory, in the place of a parameter's gradient; ``value`` is what waits."""

    value: Waiting

    @staticmethod
    def __new__(cls, value: Waiting) -> WaitingGradient:
        made: WaitingGradient = Tensor._make_wrapper_subclass(cls, value.shape, dtype=value.dtype, device=value.device)
        made.value = value
        return made

    def refusal(self, what: str) -> WaitingGradientError:
        return WaitingGradientError(
            f"the gradient of {self.value.name!r} was {what}, but waits in host memory for the optimizer's step; use a "
            "copy on the device, p.grad.clone(), or give a larger budget, with which gradients wait on the device"
        )

    def whole(self, what: str) -> Tensor:
        return self.value.read()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"WaitingGradient({self.value.name!r} {list(self.shape)}, {self.dtype}, in host memory)"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.value.read()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.value.read().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})


def waiting(gradient: Tensor | None) -> Waiting | None:
    """What waits of a parameter's gradient in host memory; None where it does not."""
    return gradient.value if isinstance(gradient, WaitingGradient) else None


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    operator = func.overloadpacket
    first = args[0] if args else None
    if operator in _OF_LISTS:
        return _OF_LISTS[operator](func, *args)
    if isinstance(first, WaitingGradient):
        if operator in (aten.detach, aten.alias):
            return WaitingGradient(first.value)
        if operator is aten.zero_:
            first.value.clear()
            return first
        if operator is aten.mul_ and _is_number(args[1]):
            first.value.multiply(args[1])
            return first
        if operator is aten.linalg_vector_norm and not kwargs and (args[1:] or (2,)) in ((2,), (inf,)):
            return first.value.norm(*args[1:] or (2,))
    written = written_arguments(func)
    is_view = (returns_view(func) and not written) or torch.Tag.inplace_view in func.tags
    is_of_list = any(isinstance(a, list | tuple) and _has_waiting(a) for a in args)
    if is_view or written - {0} or is_of_list:
        one = next(a for a in tree_leaves((args, kwargs)) if isinstance(a, WaitingGradient))
        what = "for a view" if is_view else "with others in a list" if is_of_list else "to write into"
        raise one.refusal(f"given to {func} {what}")
    values = tree_map(_read, args)
    result = func(*values, **tree_map(_read, kwargs))
    if written and isinstance(first, WaitingGradient):
        first.value.write(values[0])
        return first
    return result


def _norms(func: Any, gradients: Sequence[Tensor], *options: Any) -> list[Tensor]:
    return [torch.linalg.vector_norm(g, *options) for g in gradients]


def _multiply(func: Any, gradients: Sequence[Tensor], factor: Any) -> None:
    if not _is_number(factor):
        raise WaitingGradientError(f"{func} was called on gradients in host memory with a factor for each")
    for g in gradients:
        g.mul_(factor)


def _zero(func: Any, gradients: Sequence[Tensor]) -> None:
    for g in gradients:
        g.zero_()


def _unscale(func: Any, gradients: Sequence[Tensor], found: Tensor, scale: Tensor) -> None:
    """What `torch.amp.GradScaler` asks: note in ``found`` (1.0) a gradient that is not finite, and multiply all."""
    there = [g for g in gradients if not isinstance(g, WaitingGradient)]
    if there:
        func(there, found, scale)
    for g in gradients:
        if isinstance(g, WaitingGradient):
            is_wrong = ~torch.isfinite(g.value.norm(inf))
            found.copy_(torch.maximum(found, is_wrong.to(found.dtype).view_as(found)))
            g.value.multiply(scale)


# Operators on many gradients, which are never on the device together.
_OF_LISTS: dict[Any, Callable[..., Any]] = {
    aten._foreach_norm: _norms,
    aten._foreach_mul_: _multiply,
    aten._foreach_zero_: _zero,
    aten._amp_foreach_non_finite_check_and_unscale_: _unscale,
}


def _is_number(factor: Any) -> bool:
    is_one = isinstance(factor, Tensor) and not isinstance(factor, WaitingGradient) and factor.numel() == 1
    return isinstance(factor, int | float) or (is_one and not factor.is_complex())


def _has_waiting(a: Any) -> bool:
    return any(isinstance(leaf, WaitingGradient) for leaf in tree_leaves(a))


def _read(a: Any) -> Any:
    return a.value.read() if isinstance(a, WaitingGradient) else a
