"""Gives the slices that are active right now, each with its part of a parameter and of the parameter's gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from chunkft_fx.gradients.slice_gradient import SliceGradient, cut_from, part_of
from chunkft_fx.graph.layout import wide_dtype
from chunkft_fx.plan.chunk import Slice


@dataclass(eq=False)
class ActiveSlice:
    """One active slice of a parameter, and the part of ``parameter.grad`` that belongs to it."""

    slice: Slice
    parameter: nn.Parameter

    @property
    def name(self) -> str:
        """The name of the parameter in the model."""
        return self.slice.name

    @property
    def dim(self) -> int:
        """The dimension of the parameter along which it is cut."""
        return self.slice.dim

    @property
    def start(self) -> int:
        """The first index of the slice along ``dim``."""
        return self.slice.start

    @property
    def length(self) -> int:
        """The number of indices along ``dim``."""
        return self.slice.length

    @property
    def grad(self) -> Tensor | None:
        """The slice's gradient: its shape, on the device that the model runs on; None where there is none.

        It is float32 (float64 for a float64 parameter), adds up over backward calls, and shares the memory of
        ``parameter.grad``.
        """
        return part_of(self.parameter.grad, self.slice)

    @grad.setter
    def grad(self, gradient: Tensor | None) -> None:
        if gradient is not None and not self.slice.is_whole:
            gradient = SliceGradient(gradient, self.slice, self.parameter.shape)
        self.parameter.grad = gradient

    def add(self, gradient: Tensor) -> None:
        """Add a gradient from `handed` to the parameter's, where autograd does not."""
        held = self.parameter.grad
        if held is None:
            self.parameter.grad = gradient.detach()
        else:
            held.add_(gradient)

    def weight(self) -> Tensor:
        """The slice of the parameter itself: a view that shares its memory, without autograd."""
        return cut_from(self.parameter.detach(), self.slice)

    def handed(self, gradient: Tensor) -> Tensor:
        """A gradient of the slice (its shape, any floating dtype) as autograd is to give it to the parameter.

        A gradient that is wider than the parameter was made for this slice alone (as a sum of contributions, or by the
        operator of `passes.lower_triton`), so the parameter keeps it as it is. Of any other gradient, a parameter that
        has none yet keeps a copy, which is made here: a caller that hands gradients over one by one, and lets go of
        each, then holds only one of them twice at a time. A parameter that has a gradient adds the new one to it.
        """
        wide = wide_dtype(self.parameter.dtype)
        is_own = gradient.dtype == wide != self.parameter.dtype
        if not is_own and self.parameter.grad is None:
            gradient, is_own = gradient.to(wide, copy=True), True
        if is_own and self.slice.is_whole:
            return gradient
        return SliceGradient(gradient, self.slice, self.parameter.shape, wide, is_new=not is_own)


def within_slice(s: ActiveSlice, part: ActiveSlice, gradient: Tensor | None = None) -> Tensor:
    """The gradient of a part of a slice: a view of that of the slice, which is its own if none is given."""
    found = s.grad if gradient is None else gradient
    assert found is not None
    return found.narrow(s.dim, part.start - s.start, part.length) if found.ndim else found


def summed(contributions: Sequence[Tensor]) -> Tensor:
    """The sum of contributions to a gradient, of which several are added in a wider dtype, as `runtime.step` does."""
    total = contributions[0]
    for value in contributions[1:]:
        total = total.to(wide_dtype(total.dtype)) + value
    return total
