"""Decides what to plan for before the first batch: an example of the largest one, given to compile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from chunkft_fx.errors import OptionError
from chunkft_fx.torch_internals import tree_flatten, tree_map
from chunkft_fx.torch_sizes import may_vary


class PlanMade(BaseException):
    """Ends a call that was to have a plan made for its batch, and nothing else."""


def arguments_of(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """An example as a call's arguments: a mapping as keywords, a tuple or list as positions, a tensor as the only one.

    Raises `OptionError` for anything else.
    """
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, (tuple, list)):
        return tuple(batch), {}
    if isinstance(batch, Tensor):
        return (batch,), {}
    raise OptionError(
        f"batch={type(batch).__name__} is not known; give the arguments of one call, a dict of keyword arguments or a "
        'tuple of positional ones, as tensors of the largest shapes (device="meta" takes no memory)'
    )


def plan_for_example(
    call: Callable[..., Any], example: Any, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device
) -> None:
    """Have a plan made for an example, before the batch ``(args, kwargs)`` comes; ``call`` ends with `PlanMade`.

    Sizes in which the batch differs from the example are expected to vary.
    """
    leaves, structure = tree_flatten(arguments_of(example))
    given, other = tree_flatten((args, kwargs))
    pairs = given if structure == other else [None] * len(leaves)
    made = iter([_like(leaf, beside, device) for leaf, beside in zip(leaves, pairs, strict=True)])
    positional, keywords = tree_map(lambda _leaf: next(made), arguments_of(example))
    try:
        call(*positional, **keywords)
    except PlanMade:
        return
    raise AssertionError("a call that was to plan came to an end")


def _like(leaf: Any, beside: Any, device: torch.device) -> Any:
    """What stands for a leaf of an example: zeros where the batch has its tensor, whose sizes may differ."""
    if not isinstance(leaf, Tensor):
        return leaf
    is_pair = isinstance(beside, Tensor) and beside.ndim == leaf.ndim
    made = torch.zeros(leaf.shape, dtype=leaf.dtype, device=beside.device if is_pair else device)
    for dim in range(leaf.ndim if is_pair else 0):
        if leaf.shape[dim] != beside.shape[dim]:
            may_vary(made, dim)
    return made.requires_grad_(leaf.requires_grad)
