"""Defines the slice gradient, which ``parameter.grad`` is while only a slice of the parameter has a gradient.

A `SliceGradient` has the parameter's shape and owns the memory of the slice alone; outside of it no gradient is
computed. Torch's own tools (clipping, scalers, ``zero_grad``, hooks) see it as any gradient. What makes sense for the
slice alone works on it: norms, sums, scaling, zeroing, finite checks, casts, sums with other gradients. Everything else
raises `SliceGradientError`. An operation on a slice gradient and a tensor of the parameter's shape reads the slice of
that tensor. What a parameter keeps of the gradient of its whole is a plain tensor, and so is what is computed from one.

A gradient on its way to a parameter that has one already is *new*: it may share memory with others, and be narrower
than its dtype says, since it is added as it is. Should the parameter keep it after all (a hook took the other away),
autograd takes it with ``detach``, which makes of a new one a copy in its dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from chunkft_fx.errors import SliceGradientError
from chunkft_fx.gradients.stand_in import StandIn
from chunkft_fx.gradients.used import UsedGradient
from chunkft_fx.plan.chunk import Slice
from chunkft_fx.torch_internals import tree_leaves, tree_map

aten = torch.ops.aten

# Operators that give zero for zero, so that what lies outside of the slice stays without gradient.
_ELEMENTWISE = {aten.abs, aten.neg, aten.sign, aten.square, aten.sqrt, aten.pow, aten.clamp, aten.mul, aten.div} | {
    aten.add, aten.sub, aten.nan_to_num, aten._to_copy, aten.zeros_like, aten.empty_like
}  # fmt: skip
# Their answers are for the slice alone, as those of all and any; torch's own finite checks are made of them.
_COMPARISONS = {aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge, aten.isfinite, aten.isnan, aten.isinf}
_IN_PLACE = {aten.abs_, aten.neg_, aten.sqrt_, aten.pow_, aten.clamp_, aten.mul_, aten.div_, aten.add_, aten.sub_} | {
    aten.nan_to_num_, aten.zero_, aten.copy_
}  # fmt: skip
_REDUCTIONS = {aten.linalg_vector_norm, aten.norm, aten.sum, aten.all, aten.any, aten.max, aten.min, aten.equal} | {
    aten.count_nonzero,
    aten._is_any_true,
    aten._is_all_true,
}
# Of many gradients at once, in place or to a number each.
_OF_LISTS = {aten._foreach_norm, aten._foreach_mul_, aten._foreach_zero_, aten._foreach_clamp_min_} | {
    aten._foreach_clamp_max_, aten._amp_foreach_non_finite_check_and_unscale_
}  # fmt: skip
_SUMS = {aten.add, aten.sub, aten.add_, aten.sub_}
# Operators in which a gradient may come behind a whole tensor; one changed in place then changes in the slice alone.
_TURNED = {aten.add, aten.mul, aten.add_, aten.sub_}


class SliceGradient(StandIn):
    """The gradient of one slice of a parameter, in the place of the parameter's gradient.

    ``slice`` says which; ``part`` is the gradient of the slice alone (its shape; dtype and device of this tensor).
    What is changed in place through one of the two is changed in both.
    """

    slice: Slice
    is_new: bool
    _held: Tensor

    @staticmethod
    def __new__(
        cls, values: Tensor, part: Slice, shape: Sequence[int], dtype: torch.dtype | None = None, is_new: bool = False
    ) -> SliceGradient:
        made: SliceGradient = Tensor._make_wrapper_subclass(
            cls, torch.Size(shape), dtype=dtype or values.dtype, device=values.device
        )
        made.slice, made._held, made.is_new = part, values, is_new
        return made

    @property
    def part(self) -> Tensor:
        """The gradient of the slice alone, of this tensor's dtype and, unless it is new, its own memory."""
        if self._held.dtype != self.dtype:
            self._held = self._held.to(self.dtype)  # for good, so that what is changed in place stays changed
        return self._held

    def kept(self) -> Tensor:
        """The gradient as a parameter keeps it; a plain tensor if the slice is the whole parameter."""
        own = self._held.to(self.dtype, copy=True)
        return own if self.slice.is_whole else SliceGradient(own, self.slice, self.shape)

    def refusal(self, what: str) -> SliceGradientError:
        return SliceGradientError(
            f"the gradient of {_where(self)} cannot be {what}: of this parameter only the active slice has a gradient; "
            "take the slice's own tensor, .grad of an entry of active_slices()"
        )

    def whole(self, what: str) -> Tensor:
        if not self.slice.is_whole:
            raise self.refusal(what)
        return self.part

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"SliceGradient({_where(self)}, {self.part!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> SliceGradient:
        return SliceGradient(self.part.clone(), self.slice, self.shape)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return SliceGradient, (self.part, self.slice, tuple(self.shape))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})


def cut_from(whole: Tensor, part: Slice) -> Tensor:
    """The slice of a tensor of the parameter's shape: a view."""
    return whole if part.is_whole else whole.narrow(part.dim, part.start, part.length)


def part_of(gradient: Tensor | None, part: Slice) -> Tensor | None:
    """A slice's part of what ``parameter.grad`` is, sharing its memory; None where it has none of this slice."""
    if isinstance(gradient, SliceGradient):
        return gradient.part if gradient.slice == part else None
    return None if gradient is None or isinstance(gradient, UsedGradient) else cut_from(gradient, part)


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    operator = func.overloadpacket
    gradients = [a for a in tree_leaves((args, kwargs)) if isinstance(a, SliceGradient)]
    first = gradients[0]
    if operator in _OF_LISTS and _makes_sense_of_each(operator, args[1:]):
        return func(*tree_map(_part, args), **tree_map(_part, kwargs))
    if operator not in _OF_LISTS and any(g.slice != first.slice or g.shape != first.shape for g in gradients):
        raise SliceGradientError(
            f"{func} was called on gradients of different slices: {', '.join(_where(g) for g in gradients)}"
        )
    if operator in (aten.detach, aten.alias):
        return first.kept() if first.is_new else _like(first, first.part)
    if operator is aten.clone:
        return _like(first, first.part.clone())
    if operator is aten.new_empty_strided and tuple(args[1]) == tuple(first.shape):
        return _like(first, torch.empty_like(first.part, dtype=kwargs.get("dtype")))
    if operator in _OF_LISTS or (not first.slice.is_whole and not _makes_sense(operator, args, kwargs, first)):
        raise SliceGradientError(
            f"{func} was called on the gradient of {_where(first)}: of this parameter only the active slice has a "
            "gradient. Norms, sums, scaling, zeroing, finite checks and casts work on it as on any gradient; for other "
            "work take the slice's own tensor, .grad of an entry of active_slices()"
        )

    def own(a: Any) -> Any:
        if isinstance(a, SliceGradient):
            return a._held if operator in _SUMS and a is not args[0] else a.part  # sums take narrower terms as they are
        return cut_from(a, first.slice) if isinstance(a, Tensor) and a.ndim else a

    result = func(*tree_map(own, args), **tree_map(own, kwargs))
    if operator in _IN_PLACE or (isinstance(args[0], SliceGradient) and result is args[0]._held):
        return args[0]
    return result if operator in _REDUCTIONS else _like(first, result)


def _makes_sense(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], first: SliceGradient) -> bool:
    """Whether an operator on the slice alone does what its caller means."""
    if operator not in _ELEMENTWISE | _COMPARISONS | _IN_PLACE | _REDUCTIONS:
        return False
    if not isinstance(args[0], SliceGradient) and operator not in _TURNED:
        return False
    tensors = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
    if any(t.shape != first.shape and t.ndim for t in tensors):
        return False
    if operator in _SUMS:  # a number would be added outside of the slice as well
        return len(tensors) == 2 and all(t.shape == first.shape for t in tensors)
    if operator in (aten.pow, aten.pow_):
        return isinstance(args[1], int | float) and args[1] > 0
    if operator in (aten.clamp, aten.clamp_):
        least, most = (*args[1:], None, None)[:2] if len(args) > 1 else (kwargs.get("min"), kwargs.get("max"))
        if len(tensors) > 1:
            return False
        return (least is None or least <= 0) and (most is None or most >= 0)
    if operator is aten.copy_:  # a number would be copied outside of the slice as well
        return all(t.shape == first.shape for t in tensors)
    if operator in _REDUCTIONS:  # along some of the dimensions the slice's result would have another shape
        if operator in (aten.max, aten.min, aten.all, aten.any, aten.count_nonzero) and len(args) > 1:
            return False
        is_of_all = all(a is None or a == [] or not isinstance(a, list | tuple) for a in args[1:])
        return is_of_all and kwargs.get("dim") is None
    return True


def _makes_sense_of_each(operator: Any, options: tuple[Any, ...]) -> bool:
    """Whether an operator on a list of gradients, with these options, does what its caller means."""
    tensors = [a for a in tree_leaves(options) if isinstance(a, Tensor)]
    if any(isinstance(t, SliceGradient) or t.ndim for t in tensors):
        return False
    if operator is aten._foreach_clamp_min_:
        return all(bound <= 0 for bound in tree_leaves(options[0]))
    if operator is aten._foreach_clamp_max_:
        return all(bound >= 0 for bound in tree_leaves(options[0]))
    return True


def _like(gradient: SliceGradient, values: Any) -> Any:
    """Values in the place of a gradient's, plain where nothing of the parameter lies outside."""
    return values if gradient.slice.is_whole else SliceGradient(values, gradient.slice, gradient.shape)


def _part(a: Any) -> Any:
    return a.part if isinstance(a, SliceGradient) else a


def _where(gradient: SliceGradient) -> str:
    s = gradient.slice
    return f"{s.name!r} ({s.start} to {s.start + s.length} of {s.size} along dimension {s.dim})"
