"""Defines the used gradient, which stands for a gradient that the backward has used for its update and let go.

With ``update="backward"`` nothing is left of a gradient when ``backward()`` returns. If ``parameter.grad`` were None
then, clipping would find a norm of 0 and clip nothing, and nobody would hear of it. So until the optimizer's step it is
a `UsedGradient`, of which nothing can be read. It can be zeroed, detached and taken off like any other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from chunkft_fx.errors import OutsideGradient, UsedGradientError
from chunkft_fx.gradients.stand_in import StandIn
from chunkft_fx.torch_internals import tree_leaves

aten = torch.ops.aten


class UsedGradient(StandIn):
    """A gradient without values, of the shape, dtype and device that it had; ``parameter_name`` is its parameter's."""

    parameter_name: str

    @staticmethod
    def __new__(cls, name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> UsedGradient:
        made: UsedGradient = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        made.parameter_name = name
        return made

    def refusal(self, what: str) -> UsedGradientError:
        return UsedGradientError(
            f'the gradient of {self.parameter_name!r} was {what}, but with update="backward" it was used for the '
            "update and is gone when backward() returns: gradients cannot be clipped, scaled or looked at there; leave "
            'that out, or make the optimizer with update="step"'
        )

    def whole(self, what: str) -> Tensor:
        raise self.refusal(what)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"UsedGradient({self.parameter_name!r} {list(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> UsedGradient:
        return UsedGradient(self.parameter_name, self.shape, self.dtype, self.device)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise self.refusal("pickled")

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        operator = func.overloadpacket
        first = next(a for a in tree_leaves((args, kwargs)) if isinstance(a, UsedGradient))
        if operator is aten.detach:
            return UsedGradient(first.parameter_name, first.shape, first.dtype, first.device)
        if operator is aten.zero_:
            return first
        if operator is aten._foreach_zero_:
            there = [g for g in args[0] if not isinstance(g, UsedGradient)]
            return func(there) if there else None
        if operator is aten.add_ and args[0] is first and isinstance(args[1], Tensor):  # as autograd adds one
            raise OutsideGradient(
                f"{first.parameter_name!r} got a gradient behind its update within the backward, and would be updated "
                'twice in a step: a weight that is also used outside of the compiled call needs update="step", or that '
                "backward before the compiled call's"
            )
        raise first.refusal(f"given to {func}")


def drop_used(parameter: Tensor) -> None:
    """Let a parameter have no gradient if it has one that was used."""
    if isinstance(parameter.grad, UsedGradient):
        parameter.grad = None
