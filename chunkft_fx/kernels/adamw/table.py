"""Decides how the AdamW kernels walk slices: which share a launch, and the table that says where their operands lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from chunkft_fx.errors import OptionError
from chunkft_fx.graph.layout import BLOCK_NUMEL, blocks_of
from chunkft_fx.kernels.adamw.reference import SliceUpdate, check_operands, operands
from chunkft_fx.kernels.launch import LaunchOptions, is_aligned, join_dims, require_reachable, signed64

# A sweep's chunks and their order; a group of 1000 slices takes 0.2 MB.
MOST_KNOWN_GROUPS = 256

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Layout:
    """A slice as (rows, middle, columns): sizes, and six strides in elements, of weight and gradient.

    A run has its length as number of rows.
    """

    sizes: tuple[int, int, int]
    strides: tuple[int, ...]
    is_run: bool


@dataclass(frozen=True)
class Variant:
    """What the kernel is compiled for; slices of one variant share a launch.

    ``dims`` says of weight and gradient where their stride is one, for walks over tiles. ``even`` means that every
    access may be as wide as `chunkft_fx.kernels.launch.ACCESS_NBYTES`, except to scales.
    """

    weight_dtype: torch.dtype
    gradient_dtype: torch.dtype
    master_dtype: torch.dtype | None
    state_dtype: torch.dtype
    has_exp_avg: bool
    is_run: bool
    even: bool
    dims: tuple[int, ...]

    @property
    def in_blocks(self) -> bool:
        """Whether moments are codes, so that the kernel walks over blocks."""
        return self.state_dtype == torch.uint8


@dataclass(frozen=True)
class Group:
    """Slices of one variant: which of the updates, by row the number of tiles up to its end, and their rows.

    Rows, int64[slices, FIELDS], lack the numbers that change from step to step.
    """

    variant: Variant
    indices: Numbers
    ends: Numbers
    rows: Numbers
    on_host: bool


# By `_place`: to check and describe a slice takes about ten times as long as to look it up.
_known_groups: dict[tuple[Any, ...], tuple[Group, ...]] = {}


def groups_of(updates: Sequence[SliceUpdate], launch: LaunchOptions) -> tuple[Group, ...]:
    """The updates by variant, checked. Only addresses are kept, no tensor."""
    key = (launch.tile, *map(_place, updates))
    if (known := _known_groups.get(key)) is not None:
        return known
    slices: dict[Variant, list[tuple[int, SliceUpdate, Layout]]] = {}
    for index, u in enumerate(updates):
        check_operands(u)
        for name, operand in operands(u).items():
            require_reachable(operand, updates[0].gradient.device, name)
        layout = _layout(u)
        slices.setdefault(_variant(u, layout), []).append((index, u, layout))
    found = tuple(_group(variant, entries, launch) for variant, entries in slices.items())
    if len(_known_groups) >= MOST_KNOWN_GROUPS:
        _known_groups.clear()
    _known_groups[key] = found
    return found


def blocks_in_tile(launch: LaunchOptions) -> int:
    """The blocks of 8-bit moments that a program updates at once."""
    return max(1, launch.tile // BLOCK_NUMEL)


def _place(u: SliceUpdate) -> tuple[Any, ...]:
    """All that the checks and the rows of an update depend on; the address also says which memory it is."""
    walked = (u.weight, u.gradient)
    states = (u.master, u.exp_avg, u.exp_avg_sq, u.exp_avg_scales, u.exp_avg_sq_scales)
    return (
        *[t if t is None else (t.data_ptr(), t.dtype, t.shape, t.stride()) for t in walked],
        *[t if t is None else (t.data_ptr(), t.dtype, t.numel(), t.is_contiguous()) for t in states],
    )


def _group(variant: Variant, entries: Sequence[tuple[int, SliceUpdate, Layout]], launch: LaunchOptions) -> Group:
    from chunkft_fx.kernels.adamw import common_triton, walks_triton

    blocks = blocks_in_tile(launch)
    height, width = (launch.tile, 1) if variant.is_run else (walks_triton.TILE_ROWS, walks_triton.TILE_COLUMNS)
    tiles, rows = [], []
    for _, u, layout in entries:
        down, deep, across = layout.sizes
        row = u.weight.numel() // len(u.weight)
        if variant.in_blocks:
            tiles.append(-(-len(u.weight) * blocks_of(row) // blocks))
        else:
            tiles.append(-(-down // int(height)) * deep * -(-across // int(width)))
        numbers = [0] * (common_triton.FIELDS.value - common_triton.LR.value)
        rows.append([*layout.sizes, *_addresses(u), row, *layout.strides, *numbers])
    on_host = any(t.device.type == "cpu" for _, u, _ in entries for t in operands(u).values())
    indices = np.array([index for index, _, _ in entries])
    return Group(variant, indices, np.cumsum(tiles), np.array(rows), on_host)


def numbers_of(
    group: Group, steps: Numbers, lr: float, beta1: float, beta2: float, weight_decay: float, seed: int
) -> Numbers:
    """The group's rows with this step's numbers; Python's powers, for torch takes those."""
    from chunkft_fx.kernels.adamw import common_triton

    table = group.rows.copy()
    numbers = table.view(np.float64)
    numbers[:, common_triton.LR.value] = lr
    numbers[:, common_triton.WEIGHT_DECAY.value] = weight_decay
    for step in set(steps.tolist()):
        at = steps == step
        numbers[at, common_triton.FIRST_CORRECTION.value] = 1 - beta1**step
        numbers[at, common_triton.SECOND_CORRECTION.value] = (1 - beta2**step) ** 0.5
    table[:, common_triton.SLICE_INDEX.value] = group.indices
    table[:, common_triton.SEED.value] = signed64(seed)
    return table


def _addresses(u: SliceUpdate) -> list[int]:
    """The operands' addresses in the order of the table; 0 for one that is absent."""
    named = (u.weight, u.gradient, u.master, u.exp_avg, u.exp_avg_sq, u.exp_avg_scales, u.exp_avg_sq_scales)
    return [0 if t is None else t.data_ptr() for t in named]


def _layout(u: SliceUpdate) -> Layout:
    """How the kernel walks this update's operands.

    Raises `OptionError` if that takes more than three dimensions: a parameter that is contiguous, in any memory
    format, takes three at most where `chunkft_fx.plan.cuts.cut_dim` cuts it.
    """
    walked = [u.weight, u.gradient]
    sizes, strides = join_dims(walked)
    if len(sizes) > 3:
        found = ", ".join(str(t.stride()) for t in walked)
        raise OptionError(f"weight and gradient have strides {found}; make the parameter contiguous")
    if all(s == [1] for s in strides):
        return Layout((sizes[0], 1, 1), (0,) * 6, is_run=True)
    missing = 3 - len(sizes)
    # one dimension: a single row; two: no middle
    at = min(1, len(sizes) - 1)
    rows, middle, columns = sizes[:at] + [1] * missing + sizes[at:]
    padded = [s[:at] + [0] * missing + s[at:] for s in strides]
    return Layout((rows, middle, columns), tuple(x for s in padded for x in s), is_run=False)


def _variant(u: SliceUpdate, layout: Layout) -> Variant:
    even = is_aligned([t for name, t in operands(u).items() if not name.endswith("scales")])
    dims: tuple[int, ...] = ()
    if u.exp_avg_sq.dtype == torch.uint8:
        from chunkft_fx.kernels.adamw.common_triton import DIVISOR

        even = even and u.weight[0].numel() % DIVISOR.value == 0
    elif not layout.is_run:
        from chunkft_fx.kernels.adamw.common_triton import COLUMNS, DIVISOR, NO_DIM, ROWS

        triples = [layout.strides[i : i + 3] for i in (0, 3)]
        dims = tuple(ROWS.value if s[0] == 1 else COLUMNS.value if s[2] == 1 else NO_DIM.value for s in triples)
        steps = [x for s in triples for x in s if x != 1] + [layout.sizes[0], layout.sizes[2]]
        even = even and all(x % DIVISOR.value == 0 for x in steps)
    master = None if u.master is None else u.master.dtype
    kinds = (u.weight.dtype, u.gradient.dtype, master, u.exp_avg_sq.dtype, u.exp_avg is not None)
    return Variant(*kinds, layout.is_run, even, dims)
