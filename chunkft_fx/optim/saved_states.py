"""Reads the states of a checkpoint: checks that they are a parameter's, and copies them in the format that is kept.

A moment is saved as it is kept, so that what is loaded again is what was there to the bit: floats under its name, or
8-bit codes and their scales. Any format can be loaded into any other. Floats become codes, or bfloat16, by rounding to
the nearest, as its options say of the optimizer that loads them; codes that became floats become the same codes again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from chunkft_fx.errors import CheckpointMismatch
from chunkft_fx.graph.layout import blocks_of, front, size_along
from chunkft_fx.kernels.blocks import dequantised, from_floats
from chunkft_fx.kernels.masters import split_master
from chunkft_fx.optim.states.step_counts import Counts
from chunkft_fx.plan.chunk import ALL, Share
from chunkft_fx.plan.state_spec import CODES, MASTER, REMAINDER, SCALES, StateSpec, master_dtype


@dataclass(frozen=True)
class SavedState:
    """One parameter's state as it was saved, while it was cut along ``dim``: tensors by name, and its step counts."""

    tensors: dict[str, Tensor]
    counts: Counts
    dim: int


def checked(
    name: str,
    parameter: Tensor,
    dim: int,
    saved: Mapping[str, Any],
    spec: StateSpec,
    unread: frozenset[str],
) -> dict[str, Tensor]:
    """The tensors of the state of parameter ``name``, saved while it was cut along ``dim``, once they are its own.

    ``unread`` are states that may be missing. Raises `CheckpointMismatch` otherwise.
    """
    layouts = spec.layouts(parameter)
    tensors = {key: value for key, value in saved.items() if key not in ("step", "slice_steps")}
    expected = {_state_of(key) for key in layouts} - {MASTER}
    whole = {key for key, layout in layouts.items() if not layout.is_sliced} | {MASTER}
    wrong, others = expected - unread, set(tensors)
    for state in expected | unread | {MASTER}:
        own = tensors.keys() & {state, state + CODES, state + SCALES}
        others -= own
        if own == {state} or (own == {state + CODES, state + SCALES} and state not in whole):
            wrong -= {state}
        elif own:
            wrong |= {state}
    if wrong or others:
        raise CheckpointMismatch(f"the state of {name!r} holds {sorted(tensors)}, not {sorted(expected)}")
    tensors = {key: value for key, value in tensors.items() if _state_of(key) in expected | {MASTER}}
    if MASTER in tensors and MASTER not in layouts:
        raise CheckpointMismatch(
            f"the state of {name!r} has a master weight, but the parameter is {master_dtype(parameter)} "
            "and its own master; load into a model of the dtype that was trained"
        )
    for key, value in tensors.items():
        shape = _saved_shape(key, parameter, dim, spec)
        if not isinstance(value, Tensor) or tuple(value.shape) != shape:
            raise CheckpointMismatch(
                f"{key} of {name!r} has shape {tuple(getattr(value, 'shape', ()))}, for the parameter of shape "
                f"{tuple(parameter.shape)} it must be {shape}"
            )
        _check_dtype(key, value.dtype, f"{key} of {name!r}", master_dtype(parameter))
    return tensors


def take(saved: SavedState, state: dict[str, Any], dim: int, spec: StateSpec, share: Share = ALL) -> None:
    """Copy a saved state into a parameter's, which is cut along ``dim``; its master may be a remainder.

    Of several ranks each takes what is of its ``share``.
    """
    signed = {tensor.name: tensor.is_signed for tensor in spec.tensors}
    sliced = {tensor.name for tensor in spec.tensors if tensor.mean_over is None} | {MASTER}

    def own(value: Tensor, along: int = dim) -> Tensor:
        """What of a tensor is of the share."""
        return value.narrow(along, *share.of(value.shape[along])) if value.ndim else value

    for name in {_state_of(key): None for key in saved.tensors}:
        if name == MASTER and REMAINDER in state:
            state[REMAINDER].copy_(split_master(own(saved.tensors[name]).float())[1])
        elif name + CODES in state:
            codes, scales = _codes(saved, name, dim, signed[name])
            front(state[name + CODES], dim).copy_(own(codes, 0))
            state[name + SCALES].copy_(own(scales, 0))
        else:
            value = floats(saved, name, signed.get(name, True))
            state[name].copy_(own(value) if name in sliced else value)
    state["slice_steps"] = saved.counts


def _state_of(key: str) -> str:
    """The state that a tensor of this name belongs to."""
    return key.removesuffix(CODES).removesuffix(SCALES)


def _saved_shape(key: str, parameter: Tensor, dim: int, spec: StateSpec) -> tuple[int, ...]:
    """The shape of a saved tensor of a parameter that was cut along ``dim``."""
    size = size_along(parameter, dim)
    if key.endswith(SCALES):
        return size, blocks_of(prod(parameter.shape) // max(size, 1))
    layouts = spec.layouts(parameter)
    return layouts[key].shape if key in layouts else tuple(parameter.shape)


def _check_dtype(key: str, dtype: torch.dtype, what: str, wide: torch.dtype) -> None:
    if key.endswith((CODES, SCALES)):
        kept = torch.uint8 if key.endswith(CODES) else torch.float32
        if dtype != kept:
            raise CheckpointMismatch(f"{what} is {dtype}, not {kept}: it was not saved by this library")
    elif not dtype.is_floating_point or torch.promote_types(dtype, wide) != wide:
        raise CheckpointMismatch(
            f"{what} is {dtype}, which {wide} would round; load into a model of the dtype that was trained"
        )


def floats(saved: SavedState, name: str, signed: bool) -> Tensor:
    """A saved state as floats, in the parameter's shape."""
    if name in saved.tensors:
        return saved.tensors[name]
    codes = front(saved.tensors[name + CODES], saved.dim)
    return dequantised(codes, saved.tensors[name + SCALES], signed).movedim(0, saved.dim)


def _codes(saved: SavedState, name: str, dim: int, signed: bool) -> tuple[Tensor, Tensor]:
    """A saved moment as codes, the cut dimension ``dim`` in front, and their scales."""
    if name + CODES in saved.tensors and saved.dim == dim:
        return front(saved.tensors[name + CODES], dim), saved.tensors[name + SCALES]
    return from_floats(front(floats(saved, name, signed), dim).float(), signed)
