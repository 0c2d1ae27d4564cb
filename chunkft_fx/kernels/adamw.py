"""Runs AdamW over many slices in one pass: reconcile, decay, moments, step, and the weight's rounded copy.

On CUDA a Triton kernel reads and writes each operand once, wherever it is: master weights and moments may be
staged on the device or stay in pinned host memory, which the kernel reaches over the link. On the CPU, and for
float64, the reference does the same with torch's own operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from chunkft_fx.errors import OptionError
from chunkft_fx.kernels.adamw_reference import (
    SliceUpdate,
    adamw_reference,
    check_operands,
    operands,
    require_one_device,
)
from chunkft_fx.kernels.launch import (
    LaunchOptions,
    current_device,
    device_table,
    is_aligned,
    join_dims,
    require_reachable,
    signed64,
)

__all__ = ["SliceUpdate", "adamw", "launch_adamw"]

# A sweep's chunks and their order; a group of 1000 slices takes 0.2 MB.
MOST_KNOWN_GROUPS = 256

Numbers = npt.NDArray[np.int64]


def adamw(
    updates: Sequence[SliceUpdate],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    scale: Tensor | None = None,
    seed: int = 0,
) -> None:
    """Update all slices in place by one step of AdamW (Loshchilov and Hutter, arXiv 1711.05101).

    A master whose rounded value is not the weight takes the weight's value first: it is new, or the weight was
    changed from outside; a remainder is that of whatever weight there is. ``lr`` and ``scale`` (0-d; gradients are
    multiplied by it) may be device tensors, which are read on the device. bfloat16 moments are rounded stochastically;
    ``seed`` must differ from step to step. The kernel runs on the current stream: pinned tensors must live, and stay
    unread, until it has finished.
    With float32 moments its weights are those of torch's functional AdamW to 1 ulp, where the step is small beside
    the weight (a larger one shows the last bits of the moments, which torch rounds as the processor has it).

    Raises `OptionError` for operands that do not match, and for memory that the kernel cannot reach.
    """
    for u in updates:
        if u.step < 1:
            raise OptionError(f"step is {u.step}; it counts this update too, so it is 1 or more")
        if u.exp_avg is None and beta1 != 0:
            raise OptionError(f"exp_avg is missing; only beta1=0 needs none, and beta1 is {beta1}")
    filled = [u for u in updates if u.weight.numel() or u.gradient.numel()]
    options: dict[str, Any] = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
    options |= {"scale": scale, "seed": seed}
    fused = [u for u in filled if u.gradient.is_cuda and u.gradient.dtype != torch.float64]
    plain = [u for u in filled if not u.gradient.is_cuda or u.gradient.dtype == torch.float64]
    for u in plain:
        check_operands(u)
        require_one_device(u)
    if fused:
        launch_adamw(fused, **options)
    if plain:
        adamw_reference(plain, **options)


def launch_adamw(
    updates: Sequence[SliceUpdate],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    scale: Tensor | None = None,
    seed: int = 0,
    launch: LaunchOptions | None = None,
) -> None:
    """Run the kernel on updates with elements, all with gradients on one device: a launch for each layout.

    Raises `OptionError` as `adamw` does.
    """
    device = updates[0].gradient.device
    if isinstance(lr, Tensor) and lr.device.type == "cpu":
        lr = float(lr)
    on_device = {"lr": lr if isinstance(lr, Tensor) else None, "scale": scale}
    for name, scalar in on_device.items():
        if scalar is not None:
            require_reachable(scalar, device, name)
    host_lr = 0.0 if isinstance(lr, Tensor) else float(lr)
    launch = launch or LaunchOptions()
    steps = np.array([u.step for u in updates])
    for group in _groups(updates, launch):
        numbers = _numbers(group, steps[group.indices], host_lr, beta1, beta2, weight_decay, seed)
        kernel, constants = _kernel(group.variant, launch)
        with current_device(device):
            kernel[(launch.programs(int(group.ends[-1]), device, group.on_host),)](
                device_table(np.concatenate([group.ends, numbers.reshape(-1)]), device),
                len(group.ends),
                **on_device,
                beta1_rest=float(1 - beta1),
                beta2=float(beta2),
                beta2_rest=float(1 - beta2),
                eps=float(eps),
                **constants,
                num_warps=launch.num_warps,
                enable_fp_fusion=False,
                enable_reflect_ftz=False,
            )


@dataclass(frozen=True)
class _Layout:
    """A slice as (rows, middle, columns): sizes, and six strides in elements, of weight and gradient.

    A run has its length as number of rows.
    """

    sizes: tuple[int, int, int]
    strides: tuple[int, ...]
    is_run: bool


@dataclass(frozen=True)
class _Variant:
    """What the kernel is compiled for; slices of one variant share a launch.

    ``dims`` says of weight and gradient where their stride is one. ``even`` means that every access
    may be as wide as `chunkft_fx.kernels.launch.ACCESS_NBYTES`.
    """

    weight_dtype: torch.dtype
    gradient_dtype: torch.dtype
    master_dtype: torch.dtype | None
    state_dtype: torch.dtype
    has_exp_avg: bool
    is_run: bool
    even: bool
    dims: tuple[int, ...]


@dataclass(frozen=True)
class _Group:
    """Slices of one variant: which of the updates, by row the number of tiles up to its end, and their rows.

    Rows, int64[slices, FIELDS], lack the numbers that change from step to step.
    """

    variant: _Variant
    indices: Numbers
    ends: Numbers
    rows: Numbers
    on_host: bool


# By `_place`: to check and describe a slice takes about ten times as long as to look it up.
_known_groups: dict[tuple[Any, ...], tuple[_Group, ...]] = {}


def _groups(updates: Sequence[SliceUpdate], launch: LaunchOptions) -> tuple[_Group, ...]:
    """The updates by variant, checked. Only addresses are kept, no tensor."""
    key = (launch.tile, *map(_place, updates))
    if (known := _known_groups.get(key)) is not None:
        return known
    slices: dict[_Variant, list[tuple[int, SliceUpdate, _Layout]]] = {}
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


def _place(u: SliceUpdate) -> tuple[Any, ...]:
    """All that the checks and the rows of an update depend on; the address also says which memory it is."""
    walked = (u.weight, u.gradient)
    states = (u.master, u.exp_avg, u.exp_avg_sq)
    return (
        *[t if t is None else (t.data_ptr(), t.dtype, t.shape, t.stride()) for t in walked],
        *[t if t is None else (t.data_ptr(), t.dtype, t.numel(), t.is_contiguous()) for t in states],
    )


def _group(variant: _Variant, entries: Sequence[tuple[int, SliceUpdate, _Layout]], launch: LaunchOptions) -> _Group:
    from chunkft_fx.kernels import adamw_triton

    height, width = (launch.tile, 1) if variant.is_run else (adamw_triton.TILE_ROWS, adamw_triton.TILE_COLUMNS)
    tiles, rows = [], []
    for _, u, layout in entries:
        down, deep, across = layout.sizes
        tiles.append(-(-down // int(height)) * deep * -(-across // int(width)))
        numbers = [0] * (adamw_triton.FIELDS.value - adamw_triton.LR.value)
        rows.append([*layout.sizes, *_addresses(u), *layout.strides, *numbers])
    on_host = any(t.device.type == "cpu" for _, u, _ in entries for t in operands(u).values())
    indices = np.array([index for index, _, _ in entries])
    return _Group(variant, indices, np.cumsum(tiles), np.array(rows), on_host)


def _numbers(
    group: _Group, steps: Numbers, lr: float, beta1: float, beta2: float, weight_decay: float, seed: int
) -> Numbers:
    """The group's rows with this step's numbers; Python's powers, for torch takes those."""
    from chunkft_fx.kernels import adamw_triton

    table = group.rows.copy()
    numbers = table.view(np.float64)
    numbers[:, adamw_triton.LR.value] = lr
    numbers[:, adamw_triton.WEIGHT_DECAY.value] = weight_decay
    for step in set(steps.tolist()):
        at = steps == step
        numbers[at, adamw_triton.FIRST_CORRECTION.value] = 1 - beta1**step
        numbers[at, adamw_triton.SECOND_CORRECTION.value] = (1 - beta2**step) ** 0.5
    table[:, adamw_triton.SLICE_INDEX.value] = group.indices
    table[:, adamw_triton.SEED.value] = signed64(seed)
    return table


def _addresses(u: SliceUpdate) -> list[int]:
    """The operands' addresses in the order of the table; 0 for one that is absent."""
    named = (u.weight, u.gradient, u.master, u.exp_avg, u.exp_avg_sq)
    return [0 if t is None else t.data_ptr() for t in named]


def _layout(u: SliceUpdate) -> _Layout:
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
        return _Layout((sizes[0], 1, 1), (0,) * 6, is_run=True)
    missing = 3 - len(sizes)
    # one dimension: a single row; two: no middle
    at = min(1, len(sizes) - 1)
    rows, middle, columns = sizes[:at] + [1] * missing + sizes[at:]
    padded = [s[:at] + [0] * missing + s[at:] for s in strides]
    return _Layout((rows, middle, columns), tuple(x for s in padded for x in s), is_run=False)


def _variant(u: SliceUpdate, layout: _Layout) -> _Variant:
    even = is_aligned(list(operands(u).values()))
    dims: tuple[int, ...] = ()
    if not layout.is_run:
        from chunkft_fx.kernels.adamw_triton import COLUMNS, DIVISOR, NO_DIM, ROWS

        triples = [layout.strides[i : i + 3] for i in (0, 3)]
        dims = tuple(ROWS.value if s[0] == 1 else COLUMNS.value if s[2] == 1 else NO_DIM.value for s in triples)
        steps = [x for s in triples for x in s if x != 1] + [layout.sizes[0], layout.sizes[2]]
        even = even and all(x % DIVISOR.value == 0 for x in steps)
    master = None if u.master is None else u.master.dtype
    kinds = (u.weight.dtype, u.gradient.dtype, master, u.exp_avg_sq.dtype, u.exp_avg is not None)
    return _Variant(*kinds, layout.is_run, even, dims)


def _kernel(variant: _Variant, launch: LaunchOptions) -> tuple[Any, dict[str, Any]]:
    """The kernel of a variant and its compile-time constants."""
    import triton.language as tl

    from chunkft_fx.kernels import adamw_triton

    pointees = {
        torch.float32: tl.float32,
        torch.float16: tl.float16,
        torch.bfloat16: tl.uint16,
        torch.int16: tl.int16,
        None: None,
    }
    constants = {
        "WEIGHT_DTYPE": pointees[variant.weight_dtype],
        "GRADIENT_DTYPE": pointees[variant.gradient_dtype],
        "MASTER_DTYPE": pointees[variant.master_dtype],
        "STATE_DTYPE": pointees[variant.state_dtype],
        "HAS_EXP_AVG": variant.has_exp_avg,
    }
    if variant.is_run:
        return adamw_triton.adamw_runs, constants | {"ALIGNED": variant.even, "TILE": launch.tile}
    names = ("WEIGHT_DIM", "GRADIENT_DIM")
    dims = dict(zip(names, variant.dims, strict=True))
    return adamw_triton.adamw_tiles, constants | {"EVEN": variant.even} | dims
